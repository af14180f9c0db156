"""Code that a model wrote runs in a process of its own, and whatever it does, the caller goes on."""

import os
import sys
import threading
import time

import pytest

from oribi.compat import untrusted
from oribi.compat.untrusted import check_python_modules, create_locked_down_function, execute_with_time_limit
from oribi.compat.untrusted_worker import pack_value, unpack_value

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of a process need Linux or macOS")


def run(code, *args, **limits):
    return create_locked_down_function(code, **{"seconds": 2.0, **limits})(*args)


def body(*lines):
    return "def f(*args):\n" + "".join(f"    {line}\n" for line in lines)


def test_a_function_is_called_as_often_as_wanted_and_keeps_its_process():
    play = create_locked_down_function("import math\ndef play(board, *, n=2):\n    import math\n    return math.factorial(n) + len(board)\n")  # fmt: skip
    process = play._process.pid
    assert play.__name__ == "play"
    assert [play([1] * i, n=3) for i in range(20)] == [6 + i for i in range(20)]
    assert play._process.pid == process != os.getpid()


def test_plain_data_passes_unchanged():
    values = [None, True, 1, 2.5, float("inf"), "é", b"\x00\xff", 1 + 2j, [1, [2, (3,)]], (1, 2), {1, 2}, frozenset("a"),
              {"a": 1, "b": [1]}, {1: "x", (2, 3): {"y"}}, {"": 1}, 10**30]  # fmt: skip
    echo = create_locked_down_function("def echo(x): return x")
    for value in values:
        assert echo(value) == value == unpack_value(pack_value(value))
        assert type(echo(value)) is type(value)


def test_what_is_no_plain_data_is_refused_on_either_side():
    echo = create_locked_down_function("def echo(x): return x")
    with pytest.raises(TypeError, match="builtins.object does not pass between the processes"):
        echo(object())
    with pytest.raises(TypeError, match="does not pass between the processes"):
        run("def f(): return lambda: 1")
    assert echo(1) == 1


def test_a_function_sees_no_names_of_its_module_but_its_own():
    with pytest.raises(NameError, match="helper"):
        run("def f(x):\n    return helper(x)\ndef helper(x):\n    return x\n", 1)
    with pytest.raises(NameError, match="math"):
        run("import math\ndef f(x):\n    return math.sqrt(x)\n", 4)
    assert run("def f(n): return 1 if n < 2 else n * f(n - 1)", 5) == 120


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("def f(:", SyntaxError, "invalid syntax"),
        ("x = 1", ValueError, "defines no function"),
        ("raise KeyError('no')\ndef f(): pass", KeyError, "no"),
        (body("return 1 / 0"), ZeroDivisionError, "division by zero"),
        (
            body("raise UnicodeDecodeError('utf-8', b'', 0, 1, 'bad')"),
            RuntimeError,
            "UnicodeDecodeError: .*bad",
        ),
        (body("class Own(Exception): pass", "raise Own('mine')"), RuntimeError, "Own: mine"),
        (body("import numpy"), ModuleNotFoundError, "numpy"),
    ],
)
def test_what_the_code_raises_is_raised_here(code, error, message):
    with pytest.raises(error, match=message):
        run(code)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (["while True: pass"], TimeoutError),
        (["10 ** 10 ** 10"], (TimeoutError, MemoryError)),
        (["while True: print('x' * 1000000)"], TimeoutError),
        (["import time", "time.sleep(60)"], TimeoutError),
        (["return len(bytearray(4 << 30))"], MemoryError),
        (["x = [0]", "while True: x += x"], (MemoryError, TimeoutError)),
        (["return f()"], RecursionError),
        (["import os", "while True: os.fork()"], OSError),
        (["import _thread", "_thread.start_new_thread(print, ())"], RuntimeError),
        (["import os", "os._exit(0)"], RuntimeError),
        (["import sys", "sys.exit()"], RuntimeError),
        (["raise KeyboardInterrupt"], RuntimeError),
        (["import os", "os.kill(os.getpid(), 9)"], RuntimeError),
        (["import _signal", "[_signal.signal(s, _signal.SIG_IGN) for s in (1, 2, 14, 15)]", "while True: pass"], TimeoutError),
        (["try:", " while True: pass", "finally:", " return 1"], TimeoutError),
        (["return 'x' * (70 << 20)"], (ValueError, MemoryError, TimeoutError)),
        (["a = []", "for i in range(100000): a = [a]", "return a"], RecursionError),
    ],
)  # fmt: skip
def test_hostile_code_ends_with_an_error_and_without_its_process(lines, error):
    started = time.monotonic()
    function = create_locked_down_function(body(*lines), seconds=1.0)
    process = function._process.pid
    with pytest.raises(error):
        function()
    assert time.monotonic() - started < 40  # the longest would take 60
    function.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    "frame", [b"\xff\xff\xff\x7f", b"\x02\x00\x00\x00[}", b"\x02\x00\x00\x00[]", b"\x01"]
)
def test_answers_that_the_code_forges_are_read_as_no_answers(frame):
    code = body("import os", "for number in range(3, 32):", f"  try: os.write(number, {frame!r})", "  except OSError: pass", "os._exit(0)")  # fmt: skip
    with pytest.raises(RuntimeError, match="the function"):
        run(code)


def test_the_code_is_told_nothing_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "HF_TOKEN" not in run(body("import os", "return list(os.environ)"))
    tmp_path.chmod(0o777)
    with pytest.raises(OSError):
        run(body("with open(args[0], 'w') as file: file.write('x' * 100)"), str(tmp_path / "file"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, which changes its user")
def test_root_does_not_lend_its_rights():
    assert run(body("import os", "return os.geteuid()")) != 0
    with pytest.raises(PermissionError):
        run(body("import os", "os.kill(os.getppid(), 0)"))


def test_a_function_that_was_ended_starts_again():
    function = create_locked_down_function("def f(n):\n    while n: pass\n    return 7\n", seconds=0.5)
    with pytest.raises(TimeoutError, match="took longer than 0.5 seconds"):
        function(1)
    assert function(0) == 7


def test_a_time_limit_ends_the_caller_and_the_code_that_it_calls():
    function = create_locked_down_function("def f():\n    while True: pass\n")
    process = function._process.pid

    @execute_with_time_limit(0.3)
    def play(moves):
        moves.append(1)
        function()

    moves = []
    with pytest.raises(TimeoutError, match="it ran longer than 0.3 seconds"):
        play(moves)
    assert moves == [1]  # it ran here
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)

    @execute_with_time_limit(5)
    def quick(a, b=2):
        """Adds."""
        return a + b

    assert quick(1, b=3) == 4
    assert quick.__doc__ == "Adds."


def test_a_time_limit_holds_where_the_function_catches_it_once():
    @execute_with_time_limit(0.2)
    def stubborn():
        try:
            while True:
                pass
        except TimeoutError:
            while True:
                pass

    with pytest.raises(TimeoutError):
        stubborn()


def test_an_outer_limit_outlives_an_inner_one():
    @execute_with_time_limit(60)
    def inner():
        return 1

    @execute_with_time_limit(0.4)
    def outer():
        inner()
        while True:
            pass

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        outer()
    assert time.monotonic() - started < 30


def test_a_time_limit_holds_in_other_threads():
    found = []

    @execute_with_time_limit(0.2)
    def endless():
        while True:
            pass

    def call():
        try:
            endless()
        except TimeoutError as error:
            found.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(10)
    assert found == ["it ran longer than 0.2 seconds"]


@pytest.mark.parametrize("seconds", [0, -1, None, "5", True])
def test_limits_that_are_no_seconds_are_refused(seconds):
    with pytest.raises(ValueError, match="give seconds above 0"):
        execute_with_time_limit(seconds)


def test_imports_are_sorted_by_where_they_come_from():
    ok, found = check_python_modules(
        "import math, os.path\nfrom collections import deque\ndef f():\n    import re\n"
    )
    assert ok
    assert found["stdlib"] == ["collections", "math", "os", "re"]
    ok, found = check_python_modules(
        "def f():\n    import numpy.linalg\n    from torch import nn\n    __import__('pandas')\n"
    )
    assert not ok
    assert found["non_stdlib"] == ["numpy", "pandas", "torch"]
    assert check_python_modules("from . import x")[0] is False
    for broken in ("def f(:", "x = '\0'", "(" * 100_000):
        ok, found = check_python_modules(broken)
        assert not ok
        assert "error" in found


def test_scripts_find_the_names_in_oribi():
    import oribi

    assert oribi.create_locked_down_function is untrusted.create_locked_down_function
    assert oribi.check_python_modules is check_python_modules
    assert oribi.execute_with_time_limit is execute_with_time_limit
