"""The names ComfyUI's core touches while importing. Using one is an error, never a silent wrong result."""


class _StandIn:
    """A class which can be named and subclassed, but not built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"torchvision.transforms.{type(self).__name__} is a stand-in of the test bed")


class Normalize(_StandIn): ...


class Resize(_StandIn): ...


class Compose(_StandIn): ...


class ToTensor(_StandIn): ...


class InterpolationMode:
    """The constants that ComfyUI names in default arguments."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
