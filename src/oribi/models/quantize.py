"""Filling a model from a checkpoint, one tensor at a time, quantised to NF4 as it arrives.

The model is built on the meta device, without storage. Names and shapes are checked against the checkpoint's headers
before any tensor is read. N out features, K in features of a linear layer.
"""

import math
from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn

from oribi.errors import ModelError
from oribi.gguf.coded import CodedSource
from oribi.kernels import nf4
from oribi.kernels.expert_stack import PackedStack
from oribi.kernels.nf4 import BLOCK
from oribi.kernels.packed_weight import PackedWeight
from oribi.models.checkpoint_tensors import (
    NF4_KEY,
    STATE_KEYS,
    check_tensors,
    expected_shapes,
    stored_buffers,
    ties_head,
)
from oribi.models.expert_tensors import (
    matrices_of,
    matrix_shape,
    note_on_kept,
    pack_stack,
    read_stack,
    replace_stacks,
    unstacked,
)
from oribi.models.experts import STACKS, Experts
from oribi.models.host_memory import to_pinned_memory
from oribi.models.layers import DecoderLayer
from oribi.models.load_together import LoadTogether, Packed
from oribi.models.packed_linear import PackedLinear, keep_blocks
from oribi.models.quantization import Quantization
from oribi.tensors import TensorSource
from oribi.text import gibibytes

_CPU = torch.device("cpu")


def fits_nf4(layer: nn.Linear, device: torch.device) -> bool:
    """Whether bitsandbytes can quantise and dequantise this weight rightly on the device."""
    # its CPU kernels lose the place where a row ends inside a block
    return layer.in_features % (BLOCK if device.type == "cpu" else 2) == 0


def fill(
    model: nn.Module,
    source: TensorSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization,
    trainable: bool = False,
    together: LoadTogether | None = None,
) -> list[str]:
    """Gives every parameter of a model on the meta device its values.

    Args:
        model: made by `decoder.build` on "meta"; linear layers to quantise are replaced by `Linear4bit`.
        source: the checkpoint. Weights that it holds packed in NF4 stay packed, or are dequantised where
            `quantization` is off.
        device, dtype: where the parameters lie, and what the unquantised ones are.
        quantization: which layers are packed.
        trainable: whether parameters require gradients (full fine-tuning).
        together: processes that load the same model at the same time.

    Returns:
        Notes for the user, one line each.

    Raises:
        ModelError: tensors are missing, unexpected or misshapen.
    """
    file, source = source, unstacked(source, model)
    stored = source.shapes()
    packed = {name.removesuffix(f".{NF4_KEY}") for name in stored if name.endswith(NF4_KEY)}
    quantization.kept(model)
    notes = check_tensors(model, stored, packed)
    if quantization.train_for is not None:
        file = source = CodedSource(source, model.config, expected_shapes(model), quantization.train_for)
    if quantization.as_in_file:
        notes += keep_blocks(model, file, quantization, dtype)
    else:
        notes += _replace_linears(model, packed, quantization, device, dtype)
    if quantization.enabled:
        notes += _replace_experts(model, source, packed, quantization, dtype)
    reader = _Reader(source, packed, device, dtype, quantization.double)
    model.requires_grad_(trainable)
    shards = None if together is None else together.split(model)
    if together is not None:
        reader.share_with(together, model)
    ends = {} if shards is None else _last_modules(model)
    tied = {"lm_head.weight"} if ties_head(model) else set()
    for prefix, module in list(model.named_modules()):
        for group in _packed_groups(module):
            reader.fill_packed(prefix, module, group)
        if isinstance(module, Experts):
            reader.fill_experts(prefix, module, trainable)
        if isinstance(module, PackedLinear):
            module.weight = PackedWeight(file.read_blocks(f"{prefix}.weight", device), dtype)
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{prefix}.{name}" if prefix else name
            if parameter.is_meta and full not in tied:
                waits = (
                    not trainable and device.type == "cuda" and getattr(module, "waits_in_host_memory", False)
                )
                value = reader.dense(full, _CPU if waits else None, name in stay_in_float32(module))
                setattr(module, name, nn.Parameter(value, requires_grad=trainable))
                if waits:
                    to_pinned_memory(getattr(module, name))
        for name in stored_buffers(module):
            setattr(module, name, reader.dense(f"{prefix}.{name}", wide=name in stay_in_float32(module)))
        if prefix in ends:
            shards.keep_part()
    if shards is not None:
        shards.require_undamaged()
        model.get_decoder().shards = shards
        notes.append(
            f"frozen weights are sharded: each of {together.processes} processes keeps {gibibytes(shards.own_bytes)} of the layers' "
            f"{gibibytes(shards.whole_bytes)}"
        )
    source.close()
    model.tie_weights()
    return notes


def stay_in_float32(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own tensors that are float32 whatever the model is."""
    return getattr(module, "stay_in_float32", ())


def _last_modules(model: nn.Module) -> set[str]:
    """Names of the modules with which each layer is filled."""
    names = [name for name, _ in model.named_modules()]
    layers = [name for name, module in model.named_modules() if isinstance(module, DecoderLayer)]
    return {[name for name in names if name.startswith(f"{layer}.")][-1] for layer in layers}


def _replace_experts(
    model: nn.Module, source: TensorSource, packed: set[str], quantization: Quantization, dtype: torch.dtype
) -> list[str]:
    """Puts stacks without values where experts will lie in codes; returns a note on those that keep a source's."""
    kept = quantization.kept_stacks(getattr(source, "stack_types", {}))
    how = quantization.packs_stack, quantization.double, dtype
    replace_stacks(model, source.shapes(), packed, *how, kept)
    return note_on_kept(kept, quantization.train_for)


def _replace_linears(
    model: nn.Module,
    packed: set[str],
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
) -> list[str]:
    """Puts an empty Linear4bit where a packed weight will lie; returns notes on layers that cannot be packed."""
    kept = []
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or not quantization.enabled:
            continue
        # a checkpoint that comes packed says itself which layers are 16-bit
        if f"{name}.weight" not in packed and (packed or not quantization.covers(name)):
            continue
        if not fits_nf4(layer, device):
            if f"{name}.weight" in packed:
                raise ModelError(
                    f"{name} has rows of {layer.in_features} values; NF4 on a CPU needs a multiple of {BLOCK}"
                )
            kept.append(name)
            continue
        parent, _, child = name.rpartition(".")
        empty = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype,
            compress_statistics=quantization.double, quant_type="nf4", device="meta",
        )  # fmt: skip
        # bitsandbytes would repack the weight in its own eval forward, and later gradients would be wrong
        empty.support_avx512bf16_for_cpu = False
        setattr(model.get_submodule(parent), child, empty)
    return notes_on_unfitting(kept, dtype)


def notes_on_unfitting(names: list[str], dtype: torch.dtype) -> list[str]:
    """The line on linear layers that `fits_nf4` leaves as they are; none where there are none."""
    if not names:
        return []
    return [
        f"{len(names)} linear layers, {names[0]} the first, stay in {str(dtype).removeprefix('torch.')}: "
        f"NF4 on a CPU needs rows of a multiple of {BLOCK} values"
    ]


def _packed_groups(module: nn.Module) -> list[list[str]]:
    """Names of the children to be packed; those of one group lie together, so that one launch can dequantise them."""
    left = {child: name for name, child in module.named_children() if isinstance(child, bnb.nn.Linear4bit)}
    of_core = module.groups().values() if callable(getattr(module, "groups", None)) else ()
    whole = [members for members in of_core if all(member in left for member in members)]
    groups = [[left.pop(member) for member in members] for members in whole]
    return groups + [[name] for name in left.values()]


def _large(model: nn.Module, in_parts: bool) -> Iterator[tuple[str, int, bool]]:
    """Tensors that one process reads for all, in the order in which they are filled, their weights, and whether each is packed.

    Those in 16 bits are sent only where nobody keeps them whole: reading what lies in the file cache takes no longer.
    """
    layers = {id(m) for layer in model.modules() if isinstance(layer, DecoderLayer) for m in layer.modules()}
    for prefix, module in model.named_modules():
        for child in (child for group in _packed_groups(module) for child in group):
            yield f"{prefix}.{child}.weight", _weights(getattr(module, child)), True
        for stack in STACKS if isinstance(module, Experts) else ():
            codes = getattr(getattr(module, stack), "packed", None)
            is_packed = isinstance(codes, PackedStack)
            if is_packed or (in_parts and codes is None):  # other codes are read as they are
                for matrix in matrices_of(module, stack):
                    yield f"{prefix}.{matrix.name}", math.prod(matrix_shape(module, matrix)), is_packed
        if in_parts and type(module) is nn.Linear and id(module) in layers:
            yield f"{prefix}.weight", _weights(module), False


def _weights(module: nn.Linear) -> int:
    return module.in_features * module.out_features


class _Reader:
    """Reads tensors of a source to where the model wants them, packing on the way."""

    def __init__(
        self, source: TensorSource, packed: set[str], device: torch.device, dtype: torch.dtype, double: bool
    ) -> None:
        self.source, self.packed, self.device, self.dtype, self.double = source, packed, device, dtype, double
        self.shapes = source.shapes()
        self._sent: set[str] = set()  # tensors that one of several processes reads

    def share_with(self, together: LoadTogether, model: nn.Module) -> None:
        """From now on read only this process's share of the large tensors, and get the others."""
        sizes, in_four_bits = {}, set()
        for name, size, is_packed in _large(model, together.in_parts):
            sizes[name] = size
            in_four_bits |= {name} if is_packed else set()
        self._sent = set(sizes)
        self._receive: Callable = together.share(
            sizes, lambda name: self._read_packed(name) if name in in_four_bits else self._read_dense(name)
        )

    def dense(self, name: str, device: torch.device | None = None, wide: bool = False) -> torch.Tensor:
        """A tensor in the compute dtype, or in float32, on the model's device if not told; a packed one is dequantised."""
        if wide:
            return self.source.read(name, device or self.device, torch.float32)
        return self._receive(name) if name in self._sent else self._read_dense(name, device)

    def _read_dense(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        if name not in self.packed:
            return self.source.read(name, device or self.device, self.dtype)
        return nf4.dequantize([_parameter(*self._stored(name))], self.dtype)

    def fill_packed(self, prefix: str, module: nn.Module, group: list[str]) -> None:
        """Packs the weights of `group`, children of `module`, one behind the other."""
        names = [f"{prefix}.{child}.weight" for child in group]
        layers = [getattr(module, child) for child in group]
        # before anything temporary: what stays would otherwise pin the memory that the temporary left
        codes, scales = self._room(names, layers)
        for name, layer, codes_of_layer, scales_of_layer in zip(names, layers, codes, scales):
            packed, state = self._codes(name)
            if tuple(state.shape) != (layer.out_features, layer.in_features):
                wanted = [layer.out_features, layer.in_features]
                raise ModelError(f"{name} is packed from {list(state.shape)}; config.json says {wanted}")
            state.absmax = scales_of_layer.copy_(state.absmax)
            layer.weight = _parameter(codes_of_layer.copy_(packed), state, layer)
            layer.quant_state = state

    def fill_experts(self, prefix: str, experts: Experts, trainable: bool) -> None:
        """Gives the experts of a layer their weights and biases."""
        where = self.device, self.dtype
        for stack in experts.stacks:
            codes = getattr(getattr(experts, stack), "packed", None)
            if isinstance(codes, PackedStack):
                pack_stack(experts, stack, lambda name: self._codes(f"{prefix}.{name}"), *where)
            elif codes is not None:
                kept = self.source.stack_codes(prefix, stack, self.device)
                setattr(experts, stack, PackedWeight(kept, self.dtype))
            else:
                value = read_stack(experts, stack, lambda name: self.dense(f"{prefix}.{name}"), *where)
                setattr(experts, stack, nn.Parameter(value, requires_grad=trainable))

    def _room(
        self, names: list[str], layers: list[nn.Linear]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Empty codes [N * K / 2, 1] uint8 and block scales of each layer, each kind in one buffer."""
        counts = [layer.in_features * layer.out_features for layer in layers]
        blocks = [
            self.shapes.get(f"{name}.absmax", (-(-count // BLOCK),))[0] for name, count in zip(names, counts)
        ]
        double = {
            f"{name}.nested_absmax" in self.shapes if name in self.packed else self.double for name in names
        }
        if len(double) > 1:
            raise ModelError(f"{', '.join(names)}: some have doubly quantised scales and some have not")
        codes = torch.empty(sum(counts) // 2, 1, dtype=torch.uint8, device=self.device)
        scales = torch.empty(
            sum(blocks), dtype=torch.uint8 if double.pop() else torch.float32, device=self.device
        )
        return list(codes.split([count // 2 for count in counts])), list(scales.split(blocks))

    def _codes(self, name: str) -> Packed:
        """Codes and scales of a tensor."""
        return self._receive(name) if name in self._sent else self._read_packed(name)

    def _read_packed(self, name: str) -> Packed:
        if name in self.packed:
            return self._stored(name)
        weight = self.source.read(name, self.device, self.dtype)
        return nf4.quantize(weight, blocksize=BLOCK, double_quant=self.double)

    def _stored(self, name: str) -> Packed:
        def read(key: str) -> torch.Tensor:
            return self.source.read(key, self.device, None)

        entries = {key: read(f"{name}.{key}") for key in STATE_KEYS if f"{name}.{key}" in self.shapes}
        state = QuantState.from_dict(entries, device=self.device)
        state.dtype = self.dtype  # what the layer computes in, whatever it was packed from
        # FSDP-friendly checkpoints store the bytes as 16-bit values
        return read(name).view(torch.uint8).reshape(-1, 1), state


def rounded_to_nf4(weight: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """A dense weight [N, K] as its codes would be read back, in its own dtype."""
    codes, state = nf4.quantize(weight, blocksize=BLOCK, double_quant=double_quant)
    return nf4.dequantize([_parameter(codes, state)], weight.dtype)


def _parameter(codes: torch.Tensor, state: QuantState, layer: nn.Module | None = None) -> bnb.nn.Params4bit:
    return bnb.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=torch.uint8, module=layer, bnb_quantized=True,
    )  # fmt: skip
