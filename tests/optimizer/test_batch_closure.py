"""A closure made from any batch gives the losses of the rows asked for, and refuses what has no rows."""

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import MutableMapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batches, cross_entropy, mlp
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

ROWS = 6
INPUTS, TARGETS = batches(1, size=ROWS)[0]
INDEX = torch.tensor([0, 3, 5])
Pair = namedtuple("Pair", "left right")


class Batch(UserDict):
    """As the Transformers library's BatchEncoding: a mapping that is no dict."""


class Config(dict):
    """A dict whose entries are attributes too."""

    __getattr__ = dict.__getitem__


class Seen(nn.Module):
    """Notes what it is called with."""

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        return args or kwargs


def rows(count: int, *shape: int) -> Tensor:
    return torch.arange(float(count)).view(-1, *[1] * len(shape)).expand(count, *shape).contiguous()


def call(inputs, targets=None, index=INDEX, **options):
    """What the model and the loss function are called with."""
    model, seen = Seen(), []

    def loss_fn(outputs, targets):
        seen.append(targets)
        return torch.ones(len(index))

    batch_closure(model, loss_fn, inputs, targets, **options)(index)
    return model.args, model.kwargs, seen[0]


def test_index_is_as_slicing_the_batch():
    model = mlp()
    closure = batch_closure(model, cross_entropy, INPUTS, TARGETS)
    torch.testing.assert_close(closure(None), cross_entropy(model(INPUTS), TARGETS))
    torch.testing.assert_close(closure(), closure(None))
    torch.testing.assert_close(closure(INDEX), closure(None)[INDEX])
    torch.testing.assert_close(closure(INDEX), cross_entropy(model(INPUTS[INDEX]), TARGETS[INDEX]))


def test_a_tensor_is_the_model_s_argument():
    args, kwargs, targets = call(rows(ROWS, 2), rows(ROWS))
    assert not kwargs
    assert torch.equal(args[0], rows(ROWS, 2)[INDEX])
    assert torch.equal(targets, rows(ROWS)[INDEX])


@pytest.mark.parametrize("kind", [list, tuple, lambda items: Pair(*items)], ids=["list", "tuple", "named tuple"])
def test_a_sequence_is_the_model_s_arguments(kind):
    args, kwargs, targets = call(kind([rows(ROWS), rows(ROWS, 2)]), kind([rows(ROWS), 3]))
    assert not kwargs
    assert [len(arg) for arg in args] == [3, 3]
    assert type(targets) is type(kind([0, 0]))
    assert torch.equal(targets[0], INDEX.float())
    assert targets[1] == 3


@pytest.mark.parametrize("kind", [dict, OrderedDict, Batch, Config])
def test_a_mapping_is_the_model_s_keywords_and_keeps_its_type(kind):
    batch = kind(tokens=rows(ROWS, 2), mask=None)
    args, kwargs, targets = call(batch, kind(labels=rows(ROWS)))
    assert not args
    assert kwargs.keys() == {"tokens", "mask"}
    assert torch.equal(kwargs["tokens"], rows(ROWS, 2)[INDEX])
    assert kwargs["mask"] is None
    assert type(targets) is kind
    assert torch.equal(targets["labels"], INDEX.float())
    assert len(batch["tokens"]) == ROWS  # the batch itself stays


def test_loss_functions_find_attributes_in_every_pass():
    model = mlp()

    def loss_fn(outputs, targets):
        return cross_entropy(outputs, targets.labels)

    for targets in (Config(labels=TARGETS), Pair(TARGETS, None)._replace(right=1)):
        by_name = loss_fn if isinstance(targets, Config) else lambda outputs, t: cross_entropy(outputs, t.left)
        ESAM(model.parameters(), torch.optim.SGD, lr=0.1).step(batch_closure(model, by_name, INPUTS, targets))


def test_entries_of_the_whole_batch_are_shared_by_path():
    table, scale, names = torch.ones(9), torch.tensor(2.0), ["a", "b"]
    inputs = {"x": rows(ROWS), "table": table, "more": [rows(ROWS), {"scale": scale}], "names": names}
    shared = ("inputs.table", "inputs.more.1.scale", "inputs.names", "targets.1")
    _, kwargs, targets = call(inputs, (rows(ROWS), table), shared=shared)
    assert kwargs["table"] is table
    assert kwargs["more"][1]["scale"] is scale
    assert kwargs["names"] is names
    assert targets[1] is table
    assert len(kwargs["x"]) == len(kwargs["more"][0]) == len(targets[0]) == 3


def test_a_whole_branch_or_the_inputs_can_be_shared():
    table = torch.ones(9)
    _, kwargs, _ = call({"x": rows(ROWS), "more": {"a": [table, "text"]}}, shared=["inputs.more"])
    assert kwargs["more"]["a"][0] is table
    args, _, targets = call(table, rows(ROWS), shared={"inputs"})
    assert args[0] is table
    assert len(targets) == 3


@pytest.mark.parametrize("value", [None, 3, 2.5, True])
def test_numbers_and_none_are_passed_on(value):
    assert call([rows(ROWS), value], value)[0][1] is value
    assert call([rows(ROWS), value], value)[2] is value


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "words"),
    [
        (rows(6), rows(5), ValueError, r"targets has 5 rows but inputs has 6.*shared=\('targets',\)"),
        ({"x": rows(6), "mask": rows(4)}, None, ValueError, r"inputs\.mask has 4.*inputs\.x has 6.*'inputs\.mask'"),
        ([rows(6), [rows(6), rows(2)]], None, ValueError, r"inputs\.1\.1 has 2 .*shared=\('inputs\.1\.1',\)"),
        ({"x": rows(6), "scale": torch.tensor(1.0)}, None, ValueError, r"inputs\.scale.*shared=\('inputs\.scale',\)"),
        (rows(6), {"weight": torch.tensor(1.0)}, ValueError, r"targets\.weight.*shared=\('targets\.weight',\)"),
        ({"x": rows(6), "name": "text"}, None, TypeError, r"inputs\.name is a str.*shared=\('inputs\.name',\)"),
        ([rows(6), {1, 2}], None, TypeError, r"inputs\.1 is a set.*shared"),
        (rows(6), object(), TypeError, r"targets is a object.*shared"),
        (None, None, ValueError, "no tensor"),
        ({"n": 3}, [None, 1.5], ValueError, "no tensor"),
    ],
)
def test_what_has_no_rows_is_refused_with_its_path_and_the_fix(inputs, targets, error, words):
    with pytest.raises(error, match=words):
        batch_closure(Seen(), cross_entropy, inputs, targets)


class Graphs:
    """As torch_geometric's batches: an object of tensors, of which some have a row for each node."""

    x, batch = torch.randn(9, 4), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        ([torch.rand(3, 8, 9), torch.rand(3, 7, 5)], torch.tensor([0, 1])),
        (["some", "text"], torch.tensor([0, 1])),
        (np.ones((2, 3)), torch.tensor([0, 1])),
        ((torch.rand(2, 5, 4), (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8))), torch.tensor([0, 1])),
        (Graphs(), torch.tensor([0, 1, 1])),
        (torch.rand(3, 8, 9), [{"boxes": torch.rand(4, 4)}, {"boxes": torch.rand(1, 4)}]),
        (torch.tensor(0.5), None),
        (None, None),
    ],
    ids=["images", "strings", "array", "state of an LSTM", "graphs", "boxes", "scalar", "nothing"],
)
def test_a_batch_of_another_kind_is_refused_with_the_closure_that_takes_it(inputs, targets):
    with pytest.raises(
        (ValueError, TypeError), match=r"write closure\(index\) by hand, which returns the losses .* model"
    ):
        batch_closure(Seen(), cross_entropy, inputs, targets)


@pytest.mark.parametrize("name", ["inputs.y", "x", "targets.0", "inputs.x.0"])
def test_shared_names_that_are_not_there_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.*begin with inputs or targets"):
        batch_closure(Seen(), cross_entropy, {"x": rows(6)}, rows(6), shared=(name,))


def test_the_model_is_carried():
    model = mlp()
    assert batch_closure(model, cross_entropy, INPUTS, TARGETS).model is model


LEAVES = st.one_of(st.none(), st.integers(), st.lists(st.integers(1, 3), max_size=2).map(lambda shape: rows(5, *shape)))
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(Batch),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(NESTED, st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_any_nesting_keeps_its_structure(nested, index):
    index = torch.tensor(index)
    taken = call([rows(5), nested], index=index)[0][1]

    def check(whole, part):
        assert type(whole) is type(part)
        if isinstance(whole, Tensor):
            assert torch.equal(part, whole[index])
        elif isinstance(whole, dict | UserDict):
            assert list(whole) == list(part)
            for key in whole:
                check(whole[key], part[key])
        elif isinstance(whole, list | tuple):
            assert len(whole) == len(part)
            for a, b in zip(whole, part):
                check(a, b)
        else:
            assert whole is part

    check(nested, taken)


def test_a_mapping_of_another_kind_is_not_written_to():
    class Proxy(MutableMapping):
        def __init__(self, items):
            self.items_ = items

        def __getitem__(self, key):
            return self.items_[key]

        def __setitem__(self, key, value):
            self.items_[key] = value

        def __delitem__(self, key):
            del self.items_[key]

        def __iter__(self):
            return iter(self.items_)

        def __len__(self):
            return len(self.items_)

    batch = Proxy({"x": rows(8, 4)})
    kept = batch["x"]
    call(batch)
    assert batch["x"] is kept


def test_a_packed_sequence_is_refused_with_what_to_give_instead():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    with pytest.raises(TypeError, match=r"inputs is a PackedSequence.*padded batch and its lengths"):
        batch_closure(nn.LSTM(2, 2), nn.MSELoss(reduction="none"), packed, torch.ones(2))


def test_what_no_rows_can_be_taken_of_is_refused_where_some_are_and_serves_where_all_are():
    jagged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    model = nn.Linear(3, 1)

    def one_each(outputs, targets):
        return torch.stack([part.square().mean() for part in outputs.unbind()])

    closure = batch_closure(model, one_each, jagged, torch.ones(2))
    ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=1).step(closure)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(TypeError, match=r"no rows can be taken of a tensor of layout torch\.jagged; .*closure"):
        ESAM(model.parameters(), torch.optim.SGD, lr=0.1, gamma=0.5).step(closure)
    assert all(map(torch.equal, before, model.parameters()))
