"""The scripts in examples/ do what they say."""

from examples import finetune


def test_finetune(capsys):
    results = finetune.main(["--pretrain-steps", "80", "--steps", "40", "--choices", "1"])
    assert set(results) == {"AdamW", "ESAM around AdamW"}
    assert all(result > 0.8 for result in results.values())  # 63 % of the tumours are benign
    assert capsys.readouterr().out.count("diagnoses are right") == 2
