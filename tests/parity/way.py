"""In which way the model is held and computed while it is compared: none of it may change a number, formats apart."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """weight_format: other than "bf16", the scenarios alone are compared, within its stated error.

    streaming: slots of a ring through which two thirds of the experts come; 0: all are resident. disk: these stay in
    their files. split: the layers on two devices. packed: from a pack of the folder instead of the folder.
    """

    weight_format: str = "bf16"
    streaming: int = 0
    disk: bool = False
    split: bool = False
    packed: bool = False
