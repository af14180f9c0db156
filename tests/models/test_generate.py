"""Generation from any mode, and answers as they reach a terminal."""

import copy

import torch

from oribi.models.generate import PrintableStreamer
from tests.data.tokenizers_small import byte_level
from tests.models.tiny import tiny_config, tiny_pair


def test_control_characters_of_an_answer_are_shown_and_not_obeyed(capsys):
    tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    streamer = PrintableStreamer(tokenizer)
    for token in tokenizer("Hello \x1b[2J\u202ethere\nnow")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out.strip() == "Hello \\x1b[2J\\u202ethere\nnow"


def test_a_stop_string_ends_generation():
    tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    model = tiny_pair(tiny_config("llama", vocab_size=len(tokenizer)))[0]
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    stop = tokenizer.decode(free[0, ids.shape[1] + 2])
    stopped = model.generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer
    )
    assert stopped.shape[1] < free.shape[1]
    assert torch.equal(stopped, free[:, : stopped.shape[1]])
