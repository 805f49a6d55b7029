"""Load a base model and its tokenizer as the options of the command line say."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..hub import check_source
from ..version import needs


def same_model(first: str, second: str) -> bool:
    """Whether two names, folders or Hub ids, are those of one model."""
    return first == second or (Path(first).is_dir() and Path(first).resolve() == Path(second).resolve())


@dataclass(frozen=True)
class BaseModel:
    """A base model, and how it is to be loaded.

    Attributes:
        name: its folder or Hub id.
        flag: the option that names it, for messages.
        load_in_4bit: quantise the weights to NF4 with bitsandbytes.
        dtype: of the weights that are not quantised: a name, or "auto" for that of the file.
        compute_dtype: that quantised weights are multiplied in: a name; None for bfloat16, on a CPU float32, since
            many CPUs are slow in bfloat16.
        device: None for the GPU, if there is one.
        gguf_file: name of a GGUF file in the folder or repository, whose weights are dequantised.
        revision: branch, tag or commit of the repository.
    """

    name: str
    flag: str = "--model"
    load_in_4bit: bool = False
    dtype: str = "auto"
    compute_dtype: str | None = None
    device: str | None = None
    gguf_file: str | None = None
    revision: str = "main"

    def __post_init__(self) -> None:
        """Refuse what cannot be loaded, before anything is.

        Raises:
            ImportError: a package is missing.
            ValueError: there is no such device or GGUF file, or there are GGUF files only and none is named.
        """
        self._check_device()
        here, folder = f"{self.flag} {self.name}", Path(self.name)
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ImportError(needs("--load-in-4bit", "bitsandbytes", "bnb"))
        if self.gguf_file is not None and find_spec("gguf") is None:
            raise ImportError(needs(f"--gguf-file {self.gguf_file}", "the package gguf", "gguf"))
        if folder.suffix == ".gguf" and folder.is_file():
            raise ValueError(f"{here} is a file; write {self.flag} {folder.parent} --gguf-file {folder.name}.")
        if not folder.is_dir():
            return
        found = sorted(path.name for path in folder.glob("*.gguf"))
        if self.gguf_file is None and found and not (folder / "config.json").exists():
            raise ValueError(f"{here} holds GGUF files only; choose one of them with --gguf-file {found[0]}.")
        if self.gguf_file is not None and not (folder / self.gguf_file).is_file():
            several = f"it has {', '.join(found)}" if found else "it has no GGUF file"
            raise ValueError(f"--gguf-file {self.gguf_file}: there is no such file in the folder {folder}; {several}.")

    @classmethod
    def of(cls, options: Namespace, name: str, **more: Any) -> BaseModel:
        """The model of this name, loaded as `options.add_loading` made the options; `more` overrules them."""
        given = {key: getattr(options, key) for key in ("load_in_4bit", "dtype", "device", "gguf_file")}
        if options.dtype not in ("auto", None):
            given["compute_dtype"] = options.dtype
        return cls(name, **{**given, **more})

    def load(self, auto_class: type = AutoModelForCausalLM, *, sharded: bool = False, **more: Any) -> PreTrainedModel:
        """Load the model in evaluation mode.

        Args:
            auto_class: transformers' class for its task.
            sharded: FSDP or DeepSpeed shards the model, for which packed weights have to be of its dtype.
            **more: further arguments of `from_pretrained`.

        Raises:
            ValueError: it cannot be loaded.
        """
        self.check_source()
        device = self._device
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        arguments = {
            "dtype": dtype,
            "quantization_config": self._quantization(dtype if sharded and dtype != "auto" else torch.uint8),
            "device_map": {"": device},
            **more,
        }
        try:
            if self.gguf_file is not None:
                return self._load_gguf(auto_class, arguments)
            return auto_class.from_pretrained(self.name, **self._source, **arguments).eval()
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{self.flag} {self.name}: it could not be loaded ({error})") from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load its tokenizer.

        Raises:
            ValueError: there is none.
        """
        self.check_source()
        try:
            return AutoTokenizer.from_pretrained(self.name, **self._source)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{self.flag} {self.name}: no tokenizer could be loaded ({error})") from error

    def config(self) -> PretrainedConfig:
        """Load its configuration.

        Raises:
            ValueError: there is none.
        """
        self.check_source()
        try:
            return AutoConfig.from_pretrained(self.name, **self._source)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(f"{self.flag} {self.name}: no configuration could be loaded ({error})") from error

    def check_source(self) -> None:
        """Check that the model is there, or on the Hub.

        Raises:
            ValueError: it is not, or the Hub cannot be reached.
        """
        try:
            check_source(self.name, "config.json", self.revision, what=f"{self.flag} {self.name}")
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error

    def _check_device(self) -> None:
        if self.device is None:
            return
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"--device {self.device}: write cpu, cuda, cuda:1 or mps.") from error
        if device.type == "meta":
            raise ValueError(f"--device {self.device} has no memory for weights: write cpu, cuda, cuda:1 or mps.")
        count = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= count:
            raise ValueError(f"--device {self.device}: there is no such GPU; torch finds {count}.")

    @property
    def _device(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def _source(self) -> dict[str, str]:
        """Arguments that tell transformers where to read from, next to the name."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"revision": self.revision, **gguf}

    def _quantization(self, storage: torch.dtype) -> BitsAndBytesConfig | None:
        """How to quantise; `storage` is the dtype of the packed weights, one for all in a shard."""
        if not self.load_in_4bit:
            return None
        compute_dtype = self.compute_dtype or ("float32" if self._device == "cpu" else "bfloat16")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
            bnb_4bit_quant_storage=storage,
        )

    def _load_gguf(self, auto_class: type, arguments: dict[str, Any]) -> PreTrainedModel:
        """Load the weights of a GGUF file, dequantised.

        transformers refuses to quantise them on the way, so a model in 4 bits is made from these weights.
        """
        quantization = arguments.pop("quantization_config")
        gguf_config = getattr(transformers, "GgufConfig", None)  # transformers 4 always dequantises
        plain = auto_class.from_pretrained(
            self.name,
            **self._source,
            **{**arguments, "device_map": {"": "cpu"} if quantization else arguments["device_map"]},
            **({"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}),
        )
        if quantization is None:
            return plain.eval()
        model = type(plain).from_pretrained(
            None,
            **{**arguments, "dtype": plain.dtype},
            config=plain.config,
            state_dict=plain.state_dict(),
            quantization_config=quantization,
        )
        model.generation_config = plain.generation_config
        model.config.name_or_path = model.name_or_path = self.name
        return model.eval()
