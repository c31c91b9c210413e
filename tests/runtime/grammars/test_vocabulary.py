"""Tokens as the bytes that they write, of tokenizers as Llama 4's is."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from arriero.errors import SessionError
from arriero.runtime.grammars.compiler import GrammarCompiler
from arriero.runtime.grammars.vocabulary import Vocabulary, byte_letters, token_bytes

SPLIT = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL = ["<|begin_of_text|>", "<|eom|>", "<|eot|>", "<|python_start|>", "<|python_end|>", "<|image|>"]


@pytest.fixture(scope="module")
def llama4_like() -> Tokenizer:
    """A byte-level BPE built as Llama 4's tokenizer.json is: a Split and a ByteLevel, merges ignored, specials last."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    texts = ['¿Qué hora es? El niño lleva 12345 ☃ y 日本語, {"name": "x"}\n\n\tdef f(a):\n        return a🦙🦙 <|eot|>']
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in CONTROL])
    tokenizer.add_tokens([AddedToken("<|plain_added|>", special=False)])
    return tokenizer


def test_letters_of_bytes_are_those_of_the_tokenizers_library() -> None:
    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_letters().values()) == list(range(256))


def test_token_bytes_put_together_are_any_text_that_is_encoded(llama4_like: Tokenizer) -> None:
    found = token_bytes(llama4_like, llama4_like.get_vocab_size())
    for text in ("¿Qué? 日本語", "🦙 \u0000\u007f\r\n", "a\tb  c\n\n", "ÿĀ\u2028", '{"k": [1, 2.5e-3, "\\u00e9"]}'):
        ids = llama4_like.encode(text, add_special_tokens=False).ids
        assert b"".join(found[token] for token in ids) == text.encode()


def test_token_bytes_are_what_the_decoder_writes(llama4_like: Tokenizer) -> None:
    found = token_bytes(llama4_like, llama4_like.get_vocab_size())
    for token, text in enumerate(found):
        assert llama4_like.decode([token], skip_special_tokens=False) == text.decode("utf-8", "replace")


def test_tokens_in_the_library_are_the_same(tiny: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    compiler = GrammarCompiler(tokenizer, 2048)
    found = token_bytes(tokenizer, 2048)
    written = [token for token in range(2048) if b"\xff" not in found[token]]  # the library's own sign, in no UTF-8
    assert len(written) == 2047
    assert [compiler.tokens.decode_bytes([token]) for token in written] == [found[token] for token in written]
    assert {token for token in written if compiler.tokens.is_special_token(token)} == set(compiler.vocabulary.added)


def test_fixed_text_is_never_written_with_an_added_token(llama4_like: Tokenizer) -> None:
    size = llama4_like.get_vocab_size()
    vocabulary = Vocabulary(llama4_like, size)
    for text in (*CONTROL, "<|plain_added|>"):
        ids = vocabulary(text)
        assert not vocabulary.added & set(ids)
        assert b"".join(vocabulary.tokens[token] for token in ids) == text.encode()


@pytest.mark.parametrize("text", [*CONTROL, "<|plain_added|>"])
def test_a_control_token_does_not_come_for_its_words(llama4_like: Tokenizer, text: str) -> None:
    size = llama4_like.get_vocab_size()
    for kind, source in (("grammar", f'start: "{text}"'), ("grammar", r"start: /(.|\n)+/"), ("regex", "[<|_a-z>]+")):
        guide = GrammarCompiler(llama4_like, size).compile(kind, source).open([])
        assert not any(guide.allows(token) for token in llama4_like.get_added_tokens_decoder())
        for token in llama4_like.get_added_tokens_decoder():
            assert not guide.fitting([token])


def test_a_grammar_may_name_a_control_token(llama4_like: Tokenizer) -> None:
    ids = {text: llama4_like.token_to_id(text) for text in CONTROL}
    source = 'start: <|python_start|> "x" <|python_end|>'
    guide = GrammarCompiler(llama4_like, llama4_like.get_vocab_size()).compile("grammar", source).open([ids["<|eom|>"]])
    for token in (ids["<|python_start|>"], llama4_like.token_to_id("x"), ids["<|python_end|>"]):
        assert [each for each in range(llama4_like.get_vocab_size()) if guide.allows(each)] == [token]
        guide.advance(token)
    assert guide.is_complete


def test_tokens_beyond_the_tokenizers_and_beyond_the_models_do_not_come(llama4_like: Tokenizer) -> None:
    known = llama4_like.get_vocab_size()
    for size in (known + 40, known - 30, 290):
        guide = GrammarCompiler(llama4_like, size).compile("regex", r"(.|\n)*").open([])
        allowed = [token for token in range(size) if guide.allows(token)]
        assert allowed
        assert max(allowed) < min(size, known)


def test_another_kind_of_tokenizer_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for decoder in (None, decoders.Metaspace(), decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])):
        if decoder is not None:
            tokenizer.decoder = decoder
        with pytest.raises(SessionError, match="need a byte-level tokenizer"):
            GrammarCompiler(tokenizer, 2).compile("regex", "a")


def test_tokens_that_are_too_long_for_the_library_are_refused(tiny: Path) -> None:
    """The longest that is taken makes a grammar; llguidance panics over one of 1,100 bytes."""
    written = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    last = max(vocabulary, key=lambda token: vocabulary[token])
    for length in (1000, 1100):
        changed = {token: number for token, number in vocabulary.items() if token != last}
        written["model"] |= {"vocab": changed | {"a" * length: vocabulary[last]}, "merges": []}
        compiler = GrammarCompiler(Tokenizer.from_str(json.dumps(written)), 2054)
        if length == 1000:
            assert compiler.compile("regex", "a+").kind == "regex"
            continue
        with pytest.raises(SessionError, match="need tokens of 1000 bytes at most, and this model's longest has 1100"):
            compiler.compile("regex", "a+")
