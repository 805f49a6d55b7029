"""Convert checkpoints of other programs, exchange experts with plain LoRAs, and edit the experts of an adapter."""

from .convert import convert_checkpoint
from .export import export_lora
from .export_report import LoRAExport, print_report
from .files import new_folder, read_adapter, write_adapter
from .restructure import Surgery
from .surgery import add_experts, list_experts, merge_experts, remove_experts, reorder_experts
from .upcycling import upcycle


__all__ = [
    "LoRAExport",
    "Surgery",
    "add_experts",
    "convert_checkpoint",
    "export_lora",
    "list_experts",
    "merge_experts",
    "new_folder",
    "print_report",
    "read_adapter",
    "remove_experts",
    "reorder_experts",
    "upcycle",
    "write_adapter",
]
