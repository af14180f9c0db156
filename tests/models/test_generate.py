"""Answers as they reach a terminal."""

import copy

import torch

from oribi.models.generate import PrintableStreamer
from tests.data.tokenizers_small import byte_level


def test_control_characters_of_an_answer_are_shown_and_not_obeyed(capsys):
    tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    streamer = PrintableStreamer(tokenizer)
    for token in tokenizer("Hello \x1b[2J\u202ethere\nnow")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out.strip() == "Hello \\x1b[2J\\u202ethere\nnow"
