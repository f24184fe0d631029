"""The processes of a run: one, or many under ``torchrun`` or ``accelerate launch``. All of accelerate is behind this.

A process of rank r sees its rows of each global batch; gradients are averaged (DDP) or sharded (FSDP2).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_vis.config import ConfigError
from tokenizers_vis.presets import usable_device
from tokenizers_vis.train.task import RunConfig

# Classes whose instances are compiled, sharded and computed again one by one.
BLOCKS = ("Block", "FlexTokBlock", "LlamaDecoderLayer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Processes:
    """rank: of this process, of ``world``. main: the one that writes. Raises ``ConfigError``."""

    def __init__(self, config: RunConfig) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, GradientState

        device = usable_device(config.device or None)
        if config.precision == "fp16" and device.type != "cuda":
            raise ConfigError(f"precision = 'fp16' needs a CUDA device, this is {device.type}: use 'bf16' or 'fp32'")
        # accelerate keeps one state a process, and a second run of the same program may want another precision.
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        GradientState._reset_state()
        self.dtype = DTYPES[config.precision]
        # Sharding is torch's own fully_shard, which works on every device; asked for by the launcher, it is the same.
        asked = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        self.sharded = (config.sharding == "fsdp" or asked) and int(os.environ.get("WORLD_SIZE", 1)) > 1
        if self.sharded and config.precision == "fp16":
            raise ConfigError("sharding = 'fsdp' trains in bf16 or fp32: its loss is not scaled")
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            cpu=device.type == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.rank == 0
        # accelerate chooses a GPU a process; alone, the one that was asked for.
        self.device = device if self.world == 1 else self.accelerator.device
        parts = self.world * config.accumulate
        if config.optim.batch_size % parts:
            raise ConfigError(
                f"optim.batch_size is the batch of all processes: {config.optim.batch_size} cannot be divided by "
                f"{self.world} processes x accumulate {config.accumulate}"
            )

    # The training step

    def prepare(
        self, module: nn.Module, optimizer: Callable[[nn.Module], Any], *, whole: bool = False
    ) -> tuple[nn.Module, Any]:
        """The module as it is called in training, and its optimiser, made when the weights lie where they stay.

        whole: not to be sharded.
        """
        if whole or not self.sharded:
            return self.accelerator.prepare(module, optimizer(module), device_placement=[False, False])
        from torch.distributed.fsdp import fully_shard

        for block in transformer_blocks(module):
            fully_shard(block)
        fully_shard(module)
        if self.dtype is not torch.float32:
            module.forward = torch.autocast(self.device.type, self.dtype)(module.forward)
        return module, optimizer(module)

    @contextmanager
    def gathering(self, module: nn.Module, *, last: bool, whole: bool = False) -> Iterator[None]:
        """Gradients are exchanged after the last of a step's pieces alone."""
        if self.sharded and not whole:
            module.set_requires_gradient_sync(last)
            yield
        else:
            with nullcontext() if last or self.world == 1 else self.accelerator.no_sync(module):
                yield

    def backward(self, loss: Tensor) -> None:
        loss.backward() if self.sharded else self.accelerator.backward(loss)

    def clip(self, optimizer: Any, limit: float) -> Tensor:
        """Scales gradients down to a norm of ``limit``, over all that the optimiser trains; gives the norm before."""
        if not self.sharded:
            self.accelerator.unscale_gradients(optimizer)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, limit)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # Across processes

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether one process says so: all stop after the same step."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def mean(self, values: Tensor) -> Tensor:
        return values if self.world == 1 else self.accelerator.reduce(values, "mean")

    def total(self, count: int) -> int:
        return sum(self.gather(count))

    def gather(self, value: Any) -> list[Any]:
        """Each process' value, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def say(self, text: str) -> None:
        if self.main:
            print(text, file=sys.stderr, flush=True)

    # Whole states, whatever is sharded

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        if not self.sharded:
            return module.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def optimizer_state(self, module: nn.Module, optimizer: Any) -> dict[str, Any]:
        if not self.sharded:
            return optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(module, optimizer, options=options)

    def load_optimizer(self, module: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
        if not self.sharded:
            optimizer.load_state_dict(state)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(module, optimizer, state, options=options)

    def scaler_state(self) -> dict[str, Any] | None:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None

    def load_scaler(self, state: dict[str, Any] | None) -> None:
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of its transformers."""
    return [module for module in model.modules() if type(module).__name__ in BLOCKS]
