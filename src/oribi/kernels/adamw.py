"""FlatAdamW: AdamW over flat buffers, in three launches for any number of parameters, without a host synchronisation.

Parameters of one dtype lie in one buffer and become views of it, each starting on a block of 256; so do their
gradients. With bits = 8, the states of tensors of at least 4096 elements are 8-bit codes (`adamw_step` says how).
lr, betas, eps, weight decay and the step count live on the device, so a CUDA graph can replay a step.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from oribi.errors import ConfigError, ModelError
from oribi.kernels.adamw_step import (
    BLOCK,
    CONTROL_WORDS,
    FACTORS,
    HYPER,
    NORM_PROGRAMS,
    TILE,
    Flat,
    adamw_step,
    dynamic_maps,
)

MIN_8BIT_SIZE = 4096
# names of optimizers that FlatAdamW computes, and the bits of its states
FLAT_OPTIMIZERS = {
    "adamw_8bit": 8,
    "adamw_bnb_8bit": 8,
    "paged_adamw_8bit": 8,
    "paged_adamw_32bit": 32,
    "paged_adamw": 32,
}


@dataclass
class _Place:
    """Where a parameter lies in its flat buffer."""

    parameter: torch.Tensor
    flat: Flat
    group: int
    start: int
    quantised: bool
    address: int
    grad: torch.Tensor
    grad_address: int


class FlatAdamW(torch.optim.Optimizer):
    """AdamW that clips, updates and zeroes gradients in three launches for any number of parameters.

    Args:
        params: parameters or groups; groups may set their own lr, betas, eps and weight_decay. Those that do not
            require a gradient are left out. One without a gradient counts as having a gradient of zero.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        max_grad_norm: gradients are scaled down to this L2 norm over all groups; None does not clip.
        bits: 32, or 8 for quantised states (tensors under 4096 elements keep 32).

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        bits: int = 8,
    ) -> None:
        if bits not in (8, 32):
            raise ConfigError(f"bits = {bits}: the optimizer's states have 8 or 32 bits")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm = {max_grad_norm} must be above 0; None does not clip")
        self.bits = bits
        self.max_grad_norm = max_grad_norm
        self._flats: list[Flat] = []
        self._places: list[_Place] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._check_groups()
        self._uploaded: list[tuple[float, ...]] = []
        self._build()

    @property
    def last_grad_norm(self) -> torch.Tensor:
        """L2 norm of the last step's gradients before clipping, a float32 scalar on the device."""
        return self._flats[0].norm

    @property
    def skipped_steps(self) -> torch.Tensor:
        """Steps skipped so far because the norm was infinite or NaN, an int64 scalar on the device."""
        return self._flats[0].skipped

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._flats:
            raise ConfigError(
                "FlatAdamW lays out its buffers once; give every parameter group when it is made"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Clip, update and zero the gradients. Capturable in a CUDA graph after `upload_settings`.

        Raises:
            ModelError: a parameter was moved to another device or cast after the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_storage()
        self.attach_grads()
        self.upload_settings()
        adamw_step(self._flats, self.max_grad_norm)
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero all gradients in place; they stay allocated whatever set_to_none says. `step` has done so already."""
        for flat in self._flats:
            flat.grads.zero_()
        for place in self._places:
            place.parameter.grad = place.grad

    @torch.no_grad()
    def attach_grads(self) -> None:
        """Make every parameter's gradient a view of the flat buffer again, keeping its value (None counts as zero).

        `model.zero_grad()` sets gradients to None, and autograd then allocates new ones: a trainer that calls this
        before the backward pass saves that memory and a copy.
        """
        moved = [place for place in self._places if place.parameter.grad is not place.grad]
        missing = [place.grad for place in moved if place.parameter.grad is None]
        found = [place for place in moved if place.parameter.grad is not None]
        if missing:
            torch._foreach_zero_(missing)
        if found:
            torch._foreach_copy_([p.grad for p in found], [p.parameter.grad for p in found])
        for place in moved:
            place.parameter.grad = place.grad

    def shared_buffers(self) -> list[torch.Tensor]:
        """The buffers that several processes sum, with every gradient in them: see `Flat.shared`."""
        self._check_storage()
        self.attach_grads()
        return [flat.shared for flat in self._flats]

    def upload_settings(self) -> None:
        """Copy lr, betas, eps and weight_decay of all groups to the device if any changed since the last time.

        `step` does so; who captures a step, or replays one, calls it before.

        Raises:
            ConfigError: settings changed while a CUDA graph is being captured, which would replay this copy for ever.
        """
        settings = [
            tuple(float(x) for x in (g["lr"], *g["betas"], g["eps"], g["weight_decay"]))
            for g in self.param_groups
        ]
        if settings == self._uploaded:
            return
        if self._flats[0].weights.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ConfigError("call FlatAdamW.upload_settings() before its step is captured in a CUDA graph")
        for flat in self._flats:
            flat.hyper.copy_(torch.tensor(settings, dtype=flat.hyper.dtype), non_blocking=True)
        self._uploaded = settings

    def state_dict(self) -> dict[str, Any]:
        """Settings and, for each parameter, views of its states under torch.optim.AdamW's names (8 bit: bitsandbytes')."""
        packed = super().state_dict()
        step, powers = self._flats[0].step.cpu(), self._flats[0].powers.cpu()
        # of their own for each parameter, as torch.optim.AdamW counts: it would add to a shared step once for each
        scalars = [
            {"step": step.clone(), "beta_powers": powers[index].clone()}
            for index, group in enumerate(self.param_groups)
            for _ in group["params"]
        ]
        packed["state"] = {index: {**state, **scalars[index]} for index, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy settings and states in; a 32-bit state may come from `torch.optim.AdamW`.

        Raises:
            ModelError: the groups or the kind of state do not match this optimizer's.
        """
        groups = state_dict["param_groups"]
        sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (groups, self.param_groups))
        if sizes != own_sizes:
            raise ModelError(
                f"the saved optimizer has groups of {sizes} parameters, this one of {own_sizes}; resume with the same "
                "model and adapter settings"
            )
        for group, saved in zip(self.param_groups, groups):
            group.update({k: v for k, v in saved.items() if k != "params"})
        indices = {
            id(p): index
            for group, saved in zip(self.param_groups, groups)
            for p, index in zip(group["params"], saved["params"])
        }
        for place in self._places:
            saved = state_dict["state"].get(indices[id(place.parameter)])
            if saved is not None:
                self._load_state(place, saved)

    def _load_state(self, place: _Place, saved: dict[str, Any]) -> None:
        own = self.state[place.parameter]
        if not set(own) <= set(saved) or any(
            x.numel() != torch.as_tensor(saved[n]).numel() for n, x in own.items()
        ):
            raise ModelError(
                f"saved optimizer state {sorted(saved)} does not fit a parameter of shape "
                f"{tuple(place.parameter.shape)} with {sorted(own)}; resume with the same model and bits = {self.bits}"
            )
        for name, x in own.items():
            x.copy_(torch.as_tensor(saved[name]).view(x.shape))
        powers = saved.get("beta_powers")
        if powers is None:
            powers = torch.tensor(
                [b ** float(saved["step"]) for b in self.param_groups[place.group]["betas"]],
                dtype=torch.float64,
            )
        place.flat.powers[place.group].copy_(powers)

    def _check_groups(self) -> None:
        for g in self.param_groups:
            if not (float(g["lr"]) >= 0 and g["eps"] > 0 and g["weight_decay"] >= 0):
                raise ConfigError(
                    f"lr = {g['lr']}, eps = {g['eps']}, weight_decay = {g['weight_decay']}: "
                    "lr and weight_decay must be at least 0 and eps above 0"
                )
            if not all(0 <= beta < 1 for beta in g["betas"]):
                raise ConfigError(f"betas = {tuple(g['betas'])} must each be at least 0 and below 1")

    def _check_storage(self) -> None:
        """Bring back parameters and gradients that a wrapper copied elsewhere on the same device.

        accelerate moves a model to "cpu:0" for several processes, and PyTorch takes that for another place than "cpu":
        it gives parameter and gradient new memory within the same objects.
        """
        for place in self._places:
            p, flat = place.parameter, place.flat
            if p.data_ptr() != place.address:
                if p.device.type != flat.weights.device.type or p.dtype != flat.weights.dtype:
                    raise ModelError(
                        f"a parameter of shape {tuple(p.shape)} was moved or replaced after FlatAdamW was "
                        "made; move and cast the model first, then make the optimizer"
                    )
                home = _own_storage(flat.weights, place.start, p.shape)
                home.copy_(p.data)
                p.data = home
            if place.grad.data_ptr() != place.grad_address:
                attached = p.grad is place.grad
                moved = place.grad
                place.grad = flat.grads[place.start : place.start + p.numel()].view(p.shape)
                place.grad.copy_(moved)
                if attached:
                    p.grad = place.grad

    def _build(self) -> None:
        members: dict[tuple, list[tuple[torch.Tensor, int]]] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    members.setdefault((p.device, p.dtype), []).append((p, index))
        if not members:
            raise ConfigError("the optimizer got no parameter that requires a gradient")
        partials = len(members) * NORM_PROGRAMS
        for number, ((device, dtype), parameters) in enumerate(members.items()):
            own = slice(number * NORM_PROGRAMS, (number + 1) * NORM_PROGRAMS)
            flat, places = _lay_out(
                parameters, device, dtype, self.bits, len(self.param_groups), partials, own
            )
            self._flats.append(flat)
            self._places += places
            for place in places:
                self.state[place.parameter] = _state_views(place)


def _lay_out(
    parameters: list[tuple[torch.Tensor, int]],
    device: torch.device,
    dtype: torch.dtype,
    bits: int,
    groups: int,
    partials: int,
    own: slice,
) -> tuple[Flat, list[_Place]]:
    """Buffers for parameters of one dtype; the parameters and their gradients become views of them."""

    def ceil(n: int, multiple: int) -> int:
        return -(-n // multiple) * multiple

    large = [(p, g) for p, g in parameters if bits == 8 and p.numel() >= MIN_8BIT_SIZE]
    small = [(p, g) for p, g in parameters if not (bits == 8 and p.numel() >= MIN_8BIT_SIZE)]
    quantised = ceil(sum(ceil(p.numel(), BLOCK) for p, _ in large), TILE)
    size = quantised + ceil(sum(ceil(p.numel(), BLOCK) for p, _ in small), TILE)
    precise = torch.float32 if device.type == "mps" else torch.float64

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    shared = zeros(size + (CONTROL_WORDS if dtype is torch.float32 else 0), dtype=dtype)
    flat = Flat(
        weights=zeros(size, dtype=dtype),
        grads=shared[:size],
        shared=shared,
        quantised=quantised,
        block_group=zeros(size // BLOCK, dtype=torch.int32),
        hyper=zeros(groups, HYPER, dtype=precise),
        powers=zeros(groups, 2, dtype=precise) + 1,
        factors=zeros(groups, FACTORS),
        partials=zeros(partials),
        own=own,
        codes=zeros(2, quantised, dtype=torch.uint8),
        absmax=zeros(2, quantised // BLOCK),
        moments=zeros(2, size - quantised),
        step=zeros(),
        norm=zeros(),
        verdict=zeros(2),
        skipped=zeros(dtype=torch.int64),
        maps=dynamic_maps().to(device) if quantised else zeros(2, 2, 256),
    )
    places = []
    for members, first in ((large, 0), (small, quantised)):
        start = first
        for p, group in members:
            weight = _own_storage(flat.weights, start, p.shape)
            grad = flat.grads[start : start + p.numel()].view(p.shape)
            weight.copy_(p.detach())
            if p.grad is not None:
                grad.copy_(p.grad)
            p.data, p.grad = weight, grad
            flat.block_group[start // BLOCK : ceil(start + p.numel(), BLOCK) // BLOCK] = group
            places.append(
                _Place(p, flat, group, start, members is large, weight.data_ptr(), grad, grad.data_ptr())
            )
            start += ceil(p.numel(), BLOCK)
    return flat, places


def _own_storage(flat: torch.Tensor, start: int, shape: torch.Size) -> torch.Tensor:
    """A part of a flat buffer as a tensor with a storage of its own over the same memory.

    Writers of safetensors files take tensors that share a storage for copies of each other and keep one of them.
    """
    size = flat.element_size()
    storage = flat.untyped_storage()[start * size : (start + shape.numel()) * size]
    return torch.empty(0, dtype=flat.dtype, device=flat.device).set_(storage, 0, shape)


def _state_views(place: _Place) -> dict[str, torch.Tensor]:
    """The parameter's states: torch.optim.AdamW's names for 32 bit, bitsandbytes' for 8 bit."""
    flat, shape, count = place.flat, place.parameter.shape, place.parameter.numel()
    state = {"step": flat.step}
    part = slice(place.start, place.start + count)
    if place.quantised:
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        codes = [c[part].view(shape) for c in flat.codes]
        return state | {
            "state1": codes[0],
            "state2": codes[1],
            "absmax1": flat.absmax[0, blocks],
            "absmax2": flat.absmax[1, blocks],
        }
    part = slice(part.start - flat.quantised, part.stop - flat.quantised)
    return state | {
        "exp_avg": flat.moments[0, part].view(shape),
        "exp_avg_sq": flat.moments[1, part].view(shape),
    }
