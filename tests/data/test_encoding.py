"""Spans of characters to labels of tokens; BOS and EOS once each."""

import pytest
from transformers.tokenization_python import PreTrainedTokenizer

from oribi.chat.masking import Marked
from oribi.data.encoding import UNTRAINED, Encoder
from oribi.errors import DataError
from tests.data.tokenizers_small import trained_runs


def encode(tokenizer, text, spans=None, closed=False, plain=True, **options):
    encoder = Encoder(tokenizer, **options)
    return encoder.encode([Marked(text, spans if spans is not None else [(0, len(text))], closed)], [plain])[
        0
    ], encoder


def test_plain_text_is_closed_with_eos_once(chatml_tokenizer):
    encoded, _ = encode(chatml_tokenizer, "Hello there")
    assert encoded.ids[-1] == encoded.labels[-1] == chatml_tokenizer.eos_token_id
    assert encoded.ids.count(chatml_tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", ["Hello<|im_end|>", "Hello<|im_end|>\n", "Hello<|endoftext|> "])
def test_text_that_a_token_ends_already_gets_no_eos(chatml_tokenizer, text):
    encoded, _ = encode(chatml_tokenizer, text)
    assert encoded.ids == chatml_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_that_only_mentions_a_token_gets_eos(chatml_tokenizer):
    encoded, _ = encode(chatml_tokenizer, "The token <|im_end|> ends a turn.")
    assert encoded.ids[-1] == chatml_tokenizer.eos_token_id


def test_no_eos_without_append_eos_and_none_for_closed_text(chatml_tokenizer):
    eos = chatml_tokenizer.eos_token_id
    assert encode(chatml_tokenizer, "Hello", append_eos=False)[0].ids[-1] != eos
    assert encode(chatml_tokenizer, "Hello", closed=True)[0].ids[-1] != eos


def test_bos_comes_once_and_is_not_trained(plain_tokenizer):
    bos = plain_tokenizer.bos_token_id
    for text in ("Hello there", "<s>Hello there"):
        encoded, encoder = encode(plain_tokenizer, text, spans=[(text.index("H"), len(text))])
        assert encoded.ids.count(bos) == 1
        assert encoded.ids[0] == bos
        assert encoded.labels[0] == UNTRAINED
        assert encoder.bos_added == 0


def test_a_template_that_forgets_bos_is_counted(plain_tokenizer):
    encoded, encoder = encode(plain_tokenizer, "USER: Hello", plain=False)
    assert encoded.ids[0] == plain_tokenizer.bos_token_id
    assert encoder.bos_added == 1


def test_a_text_that_goes_on_gets_no_bos(plain_tokenizer):
    encoder = Encoder(plain_tokenizer)
    encoded = encoder.encode([Marked("there, too", [(0, 10)], True, begins=False)], [True])[0]
    assert plain_tokenizer.bos_token_id not in encoded.ids


def test_a_token_with_a_space_before_the_span_is_trained(chatml_tokenizer):
    text = "Answer: is"
    ids = chatml_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chatml_tokenizer.decode(ids[-1:]) == " is"
    encoded, _ = encode(chatml_tokenizer, text, spans=[(8, 10)], closed=True)
    assert encoded.labels == [*[UNTRAINED] * (len(ids) - 1), ids[-1]]
    assert encoded.split_tokens == 0


def test_a_tokenizer_that_adds_no_bos_gets_none(family_tokenizer_without_bos):
    encoded, _ = encode(family_tokenizer_without_bos, "Hello there")
    assert family_tokenizer_without_bos.bos_token_id not in encoded.ids


def test_a_token_that_reaches_into_a_span_from_before_is_not_trained_and_counted(chatml_tokenizer):
    text = "The user asks"
    ids = chatml_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first, last = next((a, b) for a, b in ids["offset_mapping"] if b - a > 3)
    encoded, _ = encode(chatml_tokenizer, text, spans=[(first + 2, len(text))], closed=True)
    assert encoded.split_tokens == 1
    trained = sum(label != UNTRAINED for label in encoded.labels)
    assert trained == sum(a >= first + 2 for a, _ in ids["offset_mapping"])


def test_several_spans_are_trained_apart(chatml_tokenizer):
    text = "<|im_start|>one<|im_end|>two<|im_end|>three"
    spans = [(text.index(w), text.index(w) + len(w)) for w in ("one", "three")]
    encoded, _ = encode(chatml_tokenizer, text, spans=spans, closed=True)
    assert trained_runs(chatml_tokenizer, encoded) == ["one", "three"]


def test_every_part_of_a_character_of_several_tokens_is_trained(chatml_tokenizer):
    encoded, _ = encode(chatml_tokenizer, "a日本é", spans=[(1, 4)], closed=True)
    assert trained_runs(chatml_tokenizer, encoded) == ["日本é"]


class Characters(PreTrainedTokenizer):
    """A tokenizer without offsets: a token is a character, or a pair of equal ones."""

    def __init__(self, **kwargs):
        self.table = {chr(i): i for i in range(32, 127)} | {chr(i) * 2: i + 100 for i in range(32, 127)}
        super().__init__(eos_token="~", unk_token="?", **kwargs)

    @property
    def vocab_size(self):
        return 300

    def get_vocab(self):
        return dict(self.table)

    def _tokenize(self, text):
        tokens = []
        for character in text:
            if tokens and tokens[-1] == character:
                tokens[-1] = 2 * character
            else:
                tokens.append(character)
        return tokens

    def _convert_token_to_id(self, token):
        return self.table.get(token, 63)

    def _convert_id_to_token(self, index):
        return next(t for t, i in self.table.items() if i == index)


def test_a_tokenizer_without_offsets_is_cut_where_its_tokens_allow():
    tokenizer = Characters()
    assert not tokenizer.is_fast
    encoded, _ = encode(tokenizer, "ab:cd", spans=[(3, 5)], closed=True)
    assert encoded.labels == [UNTRAINED] * 3 + [ord("c"), ord("d")]


def test_a_tokenizer_without_offsets_never_guesses():
    with pytest.raises(
        DataError, match="tells no character offsets, and a token reaches over the boundary near 'ab::cd'"
    ):
        encode(Characters(), "ab::cd", spans=[(3, 6)], closed=True)
