"""Files that grow are read once, by whole lines, and from their beginning when they are others."""

import json
import os

from oribi.watch.follow import FollowedLines


def line(step: int, **values) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def steps(followed: FollowedLines, **settings) -> list[int]:
    return [entry["step"] for entry in followed.read(**settings)[1]]


def test_each_line_is_read_once_and_a_half_written_one_when_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    followed = FollowedLines(path)
    assert followed.read() == (False, [])  # not there yet
    whole = line(2)
    path.write_text(line(1) + whole[:5])
    assert steps(followed) == [1]
    assert followed.is_complete
    assert steps(followed) == []
    with path.open("a") as file:
        file.write(whole[5:] + line(3))
    assert steps(followed) == [2, 3]
    assert followed.damaged == 0


def test_broken_lines_are_counted_and_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                b'{"step": 1}',
                b"{",
                b"[1]",
                b'{"step": "2"}',
                b"\xff\xfe",
                b"",
                b"[" * 100_000,
                b'{"step": 3}',
                b"",
            ]
        )
    )
    followed = FollowedLines(path)
    assert steps(followed) == [1, 3]
    assert followed.damaged == 5


def test_a_file_that_was_replaced_or_cut_is_read_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(line(1, time=1.0) + line(2, time=2.0))
    followed = FollowedLines(path)
    assert steps(followed) == [1, 2]
    # resumed: a shorter file takes its place
    (tmp_path / "new").write_text(line(1, time=1.0))
    os.replace(tmp_path / "new", path)
    assert followed.read() == (True, [{"step": 1, "time": 1.0}])
    # overwritten, and longer already: the same number of a file may be given to it
    path.unlink()
    path.write_text("".join(line(step, time=9.0) for step in range(5)))
    restarted, entries = followed.read()
    assert (restarted, len(entries)) == (True, 5)
    path.unlink()
    assert followed.read() == (True, [])
    assert followed.read() == (False, [])


def test_a_huge_file_is_read_in_parts(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line(step) for step in range(1000)))
    followed = FollowedLines(path)
    found = steps(followed, most_bytes=4000)
    assert 100 < len(found) < 500
    assert not followed.is_complete
    while not followed.is_complete:
        found += steps(followed, most_bytes=4000)
    assert found == list(range(1000))


def test_a_line_longer_than_one_read_is_read_whole(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(line(1, text="x" * 10_000) + line(2))
    followed = FollowedLines(path)
    found = steps(followed, most_bytes=1000)
    while not followed.is_complete:
        found += steps(followed, most_bytes=1000)
    assert found == [1, 2]
