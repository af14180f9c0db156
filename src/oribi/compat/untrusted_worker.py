"""The process that runs code nobody has read. Python starts this file alone, isolated, without oribi or any installed package.

Frames on the pipes: 4 bytes of length, then JSON. A value that JSON has no word for is {"": its kind, "v": its parts}; both ends use
`pack_value` and `unpack_value`, which build plain data only.
"""

import json
import os
import struct
import sys

MOST_BYTES = 64 << 20  # of one frame
# what code of functions imports; loaded beforehand where the user nobody may not read Python's library
_USUAL = (
    "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools", "heapq",
    "itertools", "math", "operator", "queue", "random", "re", "statistics", "string", "time", "typing",
)  # fmt: skip
_PLAIN = (type(None), bool, int, float, str)


def pack_value(value):
    """Plain data as JSON holds it; other objects raise TypeError."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return value if all(type(v) in _PLAIN for v in value) else [pack_value(v) for v in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {"": kind.__name__, "v": [pack_value(v) for v in value]}
    if kind is dict:
        if all(type(k) is str for k in value) and "" not in value:
            return {k: pack_value(v) for k, v in value.items()}
        return {"": "dict", "v": [[pack_value(k), pack_value(v)] for k, v in value.items()]}
    if kind is complex:
        return {"": "complex", "v": [value.real, value.imag]}
    if kind is bytes:
        return {"": "bytes", "v": value.hex()}
    raise TypeError(
        f"{kind.__module__}.{kind.__name__} does not pass between the processes: numbers, texts, None, bytes, lists, tuples, sets "
        "and dicts do"
    )


def unpack_value(value):
    """What `pack_value` was given."""
    if type(value) is list:
        return value if all(type(v) in _PLAIN for v in value) else [unpack_value(v) for v in value]
    if type(value) is not dict:
        return value
    if "" not in value:
        return {k: unpack_value(v) for k, v in value.items()}
    kind, parts = value[""], value["v"]
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](unpack_value(v) for v in parts)
    if kind == "dict":
        return {unpack_value(k): unpack_value(v) for k, v in parts}
    if kind == "complex":
        return complex(*parts)
    if kind == "bytes":
        return bytes.fromhex(parts)
    raise ValueError(f"unknown kind {kind!r}")


def frame(message):
    """A message as it travels."""
    body = json.dumps(message).encode()
    if len(body) > MOST_BYTES:
        raise ValueError(f"{len(body)} bytes are more than the {MOST_BYTES} that pass between the processes")
    return struct.pack("<I", len(body)) + body


def _limit(memory_bytes, cpu_seconds):
    """Limits that the code cannot lift: memory, processor time, no processes or threads, no bytes in files, few open files."""
    import resource

    for name, most in (
        ("RLIMIT_AS", memory_bytes), ("RLIMIT_CPU", cpu_seconds), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_NOFILE", 32),
        ("RLIMIT_NPROC", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, name), (most, most))
    if os.geteuid() == 0:  # root's processes are not counted, and root may end any other
        if not _all_may_read(os.path.dirname(os.__file__)):
            for name in _USUAL:
                __import__(name)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


def _all_may_read(folder):
    """Whether every user may read what lies in a folder."""
    while os.stat(folder).st_mode & 0o005 == 0o005:
        if folder == os.path.dirname(folder):
            return True
        folder = os.path.dirname(folder)
    return False


def _function(code):
    """The first function that the code defines, alone: it sees the built-in names, its own, and what it imports itself."""
    space = {"__builtins__": __builtins__, "__name__": "untrusted"}
    exec(compile(code, "<untrusted>", "exec"), space)
    kind = type(_function)
    made = next((v for v in space.values() if type(v) is kind and v.__globals__ is space), None)
    if made is None:
        raise ValueError("the code defines no function")
    alone = {"__builtins__": __builtins__, "__name__": "untrusted"}
    locked = kind(made.__code__, alone, made.__name__, made.__defaults__, made.__closure__)
    locked.__kwdefaults__ = made.__kwdefaults__
    alone[made.__name__] = locked
    return locked


def _answer(call):
    try:
        return frame({"value": pack_value(call())})
    except BaseException as error:  # sys.exit and KeyboardInterrupt are answers, too
        try:
            return frame({"error": type(error).__name__, "text": str(error)[:2000]})
        except BaseException:
            return frame({"error": type(error).__name__, "text": ""})


def main():
    """Reads {"code"}, then {"args", "kwargs"} again and again, and answers each."""
    given, taken = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    _limit(int(sys.argv[1]), int(sys.argv[2]))
    sys.dont_write_bytecode = True
    function = None
    while True:
        head = given.read(4)
        if len(head) < 4:
            os._exit(0)
        message = json.loads(given.read(struct.unpack("<I", head)[0]))
        if "code" in message:

            def call(code=message["code"]):
                nonlocal function
                function = _function(code)
                return function.__name__
        else:

            def call(arguments=message):
                named = {k: unpack_value(v) for k, v in arguments["kwargs"].items()}
                return function(*[unpack_value(v) for v in arguments["args"]], **named)

        answer = _answer(call)
        while answer:
            answer = answer[os.write(taken, answer) :]


if __name__ == "__main__":
    main()
