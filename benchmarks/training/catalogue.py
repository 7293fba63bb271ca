"""The networks by name, with the width that each has unless told otherwise; nothing here imports torch."""

IMAGE_WIDTHS = {"small": 64, "resnet18": 64, "resnet50": 64, "wrn28_10": 10, "vit_s": 384}
LANGUAGE_WIDTHS = {"gpt": 768}
WIDTHS = IMAGE_WIDTHS | LANGUAGE_WIDTHS
