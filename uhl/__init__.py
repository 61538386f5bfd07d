"""UniHyperLoRA: one adapter file for many Transformers. Importing it registers the PEFT method `UNIHYPERLORA`."""

from uhl.config import UHLConfig
from uhl.peft_method import UHLModel
from uhl.porting import port, port_model

__all__ = ["UHLConfig", "UHLModel", "port", "port_model"]
