"""Imports of Unsloth's, TRL's, vLLM's and transformers' names that a script for oribi takes from elsewhere."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec

from oribi.compat.blocks import Block
from oribi.compat.names import NAMES, PLACES

# kind ("changed", "ignored", "refused"), where, and what is said
Change = tuple[str, ast.AST, str]

_UNSLOTH = ("unsloth", "unsloth_zoo")
# trainers and configs of any release of TRL's; a star import brings only those that the script uses
_TRAINERS = re.compile(
    r"(SFT|DPO|ORPO|CPO|KTO|BCO|GRPO|RLOO|PPO|PPOv2|XPO|NashMD|OnlineDPO|GKD|PRM|Reward)(Trainer|Config)"
)
# names of other libraries -> where a script for oribi takes them from
_MOVED = {
    "transformers.Trainer": "oribi.trl",
    "transformers.TrainingArguments": "oribi.trl",
    "vllm.SamplingParams": "oribi.compat.reinforcement",
}
_ENGINE = "oribi has no vLLM engine; load with FastLanguageModel, whose models answer with fast_generate"


@dataclass
class Bindings:
    """What the names of a script stand for: `origins` maps a name to its place, such as "trl.SFTTrainer"; `used` are names read."""

    origins: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    # attributes that are read of a name, such as {"vllm": {"SamplingParams"}}
    attributes: dict[str, set[str]] = field(default_factory=dict)
    # names of what is loaded beside a model: a tokenizer here, a processor for image-text models elsewhere
    processors: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, trees: Iterable[ast.Module]) -> "Bindings":
        found = cls()
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    found.origins[name] = alias.name if alias.asname else name
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                root = node.module.partition(".")[0]
                for alias in node.names:
                    found.origins[alias.asname or alias.name] = f"{root}.{alias.name}"
            elif isinstance(node, ast.Name):
                found.used.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.attributes.setdefault(node.value.id, set()).add(node.attr)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                called, target = ast.unparse(node.value.func), node.targets[0]
                if re.search(r"Fast\w*Model\.from_pretrained$", called) and isinstance(target, ast.Tuple):
                    found.processors |= {name.id for name in target.elts[1:] if isinstance(name, ast.Name)}
        return found

    def origin(self, node: ast.AST) -> str:
        """The place that an expression names, "" where it names none; the library and the last name count."""
        if isinstance(node, ast.Name):
            stars = [place for name, place in self.origins.items() if place.endswith(".*")]
            star = next((s.removesuffix("*") + node.id for s in stars if _in_star(s, node.id)), "")
            return self.origins.get(node.id, star)
        if isinstance(node, ast.Attribute):
            before = self.origin(node.value).partition(".")[0]
            return before and f"{before}.{node.attr}"
        return ""


def _in_star(place: str, name: str) -> bool:
    return name in NAMES if place.startswith("unsloth") else _TRAINERS.fullmatch(name) is not None


def rewrite_import(block: Block, node: ast.Import, bindings: Bindings) -> Iterator[Change]:
    """Redirect `import unsloth`, `import trl` and what else moved."""
    for alias in node.names:
        root, _, rest = alias.name.partition(".")
        bound = alias.asname or root
        if root in _UNSLOTH:
            if root == "unsloth_zoo" and bound in bindings.used:
                yield "refused", node, f"import {alias.name}: oribi has no such module"
                continue
            is_used = alias.asname is not None or root in bindings.used
            new = f"oribi as {bound}" if is_used else "oribi"
            if rest and alias.asname is None and is_used:
                if rest in PLACES:
                    new = f"oribi.{rest}, {new}"
                else:
                    yield (
                        "refused",
                        node,
                        f"import {alias.name}: oribi has no module {rest}; write unsloth.NAME",
                    )
        elif root == "trl":
            new = f"oribi.trl as {bound}"
        elif root in ("transformers", "vllm"):
            read = bindings.attributes.get(bound, set())
            homes = sorted({_MOVED[f"{root}.{name}"] for name in read if f"{root}.{name}" in _MOVED})
            if root == "vllm" and any(f"vllm.{name}" not in _MOVED for name in read or {"vllm"}):
                yield "refused", node, f"import {alias.name}: {_ENGINE}"
            if not homes:
                continue
            before = [] if root == "vllm" else [alias.name + (f" as {alias.asname}" if alias.asname else "")]
            new = ", ".join([*before, *homes])
        else:
            continue
        block.edit(*block.span(alias), new)
        yield "changed", node, f"import {alias.name} -> import {new}"


def rewrite_reference(block: Block, node: ast.Attribute, bindings: Bindings) -> Iterator[Change]:
    """Redirect `transformers.TrainingArguments` and the like, and the tokenizer of a processor, which is loaded alone here."""
    if not isinstance(node.value, ast.Name):
        return
    if node.attr == "tokenizer" and node.value.id in bindings.processors and isinstance(node.ctx, ast.Load):
        if not block.holds(node):
            return
        block.edit(block.span(node.value)[1], block.span(node)[1], "")
        yield "changed", node, f"{node.value.id}.tokenizer -> {node.value.id}"
        return
    place = bindings.origin(node)
    by_module = bindings.origins.get(node.value.id) in ("transformers", "vllm")
    if place in _MOVED and by_module and block.holds(node):
        block.edit(*block.span(node), f"{_MOVED[place]}.{node.attr}")
        yield "changed", node, f"{ast.unparse(node)} -> {_MOVED[place]}.{node.attr}"


def rewrite_import_call(block: Block, node: ast.Call, bindings: Bindings) -> Iterator[Change]:
    """Redirect `importlib.import_module("unsloth")` and `__import__("unsloth")`."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    module = node.args[0] if node.args else None
    if name not in ("import_module", "__import__") or not isinstance(getattr(module, "value", None), str):
        return
    root, _, rest = module.value.partition(".")
    if root in _UNSLOTH:
        new = f"oribi.{rest}" if rest in PLACES else "oribi"
    elif root == "trl" and name == "import_module":
        new = "oribi.trl"
    else:
        return
    block.edit(
        *block.span(module), repr(new) if "'" in ast.get_source_segment(block.text, module) else f'"{new}"'
    )
    yield "changed", node, f"{name}({module.value!r}) -> {name}({new!r})"


def rewrite_from(block: Block, node: ast.ImportFrom, bindings: Bindings) -> Iterator[Change]:
    """Redirect `from unsloth import ...` and the like, and say which names oribi has not or otherwise."""
    if not node.module or node.level:
        return
    root, names = node.module.partition(".")[0], [alias.name for alias in node.names]
    if root in _UNSLOTH:
        read = sorted(name for name in NAMES if name in bindings.used) if names == ["*"] else names
        yield from _about_names(node, read)
        if names == ["*"] and (there := [name for name in read if NAMES[name].home]):
            block.edit(*block.span(node.names[0]), ", ".join(there))
        yield from _move(block, node, "oribi")
    elif root == "trl":
        yield from _from_trl(block, node, names, bindings)
    elif root in ("transformers", "vllm"):
        moved = [alias for alias in node.names if f"{root}.{alias.name}" in _MOVED]
        if root == "vllm" and len(moved) < len(names):
            others = ", ".join(name for name in names if f"{root}.{name}" not in _MOVED)
            yield "refused", node, f"from {node.module} import {others}: {_ENGINE}"
        if moved:
            home = _MOVED[f"{root}.{moved[0].name}"]
            yield from (
                _move(block, node, home)
                if len(moved) == len(names)
                else _bind_again(block, node, home, moved)
            )


def _from_trl(block: Block, node: ast.ImportFrom, names: list[str], bindings: Bindings) -> Iterator[Change]:
    """Trainers and configs come from `oribi.trl`; so does what moved within TRL. What TRL has no more is refused."""
    if names == ["*"]:
        aliases = [ast.alias(name) for name in sorted(bindings.used) if _TRAINERS.fullmatch(name)]
        yield from _bind_again(block, node, "oribi.trl", aliases) if aliases else ()
        return
    trainers = [alias for alias in node.names if re.search(r"(Trainer|Config)$", alias.name)]
    missing, elsewhere = _not_there(node.module, names)
    yield from (("refused", node, sentence) for sentence in missing)
    if node.module == "trl" or len(trainers) == len(names) or elsewhere:
        yield from _move(block, node, "oribi.trl")
    elif trainers:
        yield from _bind_again(block, node, "oribi.trl", trainers)


def _not_there(module: str, names: list[str]) -> tuple[list[str], bool]:
    """Names that the installed TRL has nowhere, each with why; and whether some are elsewhere than the script says."""
    if find_spec("trl") is None:
        return [], False
    from oribi.compat.trl import has_name, trl_name

    missing, moved = [], False
    for name in names:
        try:
            if not has_name(module, name):
                trl_name(name)
                moved = True
        except (AttributeError, ImportError) as error:
            missing.append(f"from {module} import {name}: {error}")
    return missing, moved


def _move(block: Block, node: ast.ImportFrom, home: str) -> Iterator[Change]:
    """Put another module into a statement."""
    start = block.span(node)[0]
    match = re.compile(r"from\s+([\w.]+)").match(block.text, start)
    if match is None:
        yield "refused", node, f"write `from {node.module} import` on one line"
        return
    block.edit(match.start(1), match.end(1), home)
    yield "changed", node, f"from {node.module} -> from {home}"


def _bind_again(block: Block, node: ast.ImportFrom, home: str, aliases: list[ast.alias]) -> Iterator[Change]:
    """Import some names of a statement once more behind it, from where they are now."""
    names = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in aliases)
    end = block.span(node)[1]
    block.edit(end, end, f"; from {home} import {names}")
    yield "changed", node, f"from {home} import {names}"


def _about_names(node: ast.ImportFrom, names: list[str]) -> Iterator[Change]:
    """What differs in the names that are imported from oribi now, and which are not there."""
    for name in names:
        known = NAMES.get(name)
        if name in PLACES:
            continue
        if known is None or not known.home:
            yield "refused", node, f"{name}: {'oribi has no such name' if known is None else known.note}"
        elif known.note:
            yield "ignored", node, f"{name}: {known.note}"
