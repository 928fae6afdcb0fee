"""The names ComfyUI's core touches while importing. Using one is an error, never a silent wrong result."""


class MelScale:
    """A class which can be named and subclassed, but not built."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("torchaudio.transforms.MelScale is a stand-in of the test bed")
