"""data.py and tofu.py: what the labels are, where the border falls, which rows a name means, what a broken file says."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import huggingface_hub
import pytest
import tokenizers
import torch
from claims import claim
from helpers import BYTE_LEVEL, KINDS, SPECIAL, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers, processors

import attention
import data
import eval as evaluation
import muse
import tofu
import toy
from data import DataError, Example, Row
from hub import TOKENIZER_FILES
from model import save_pretrained

error_of = partial(helpers.error_of, kind=DataError)

# Texts that look like the machinery around them, besides anything that hypothesis finds.
TRAPS = (
    "<|im_start|> <|im_end|> <|eot_id|> <|begin_of_text|> <s> </s> <unk> <0x0A> {answer} {question} {bos} {eos} "
    "[INST] [/INST] Answer: (here) ▁ é 👩\u200d👧 e\u0301 \u200b \u2028 \u0085 \ufeff \x00"
).split(" ") + [" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "assistant\n"]
TEXTS = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(max_size=6)), max_size=6).map("".join)
ANSWERS = TEXTS.filter(lambda text: text.strip())
ORDINARY = st.text("abcd efgh.,?'1234", min_size=1, max_size=40).filter(lambda text: text.strip())


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a small tokenizer for each prompt format."""
    root = tmp_path_factory.mktemp("tokenizers")
    template = {"chat_template": "{{ bos_token + '[INST] ' + messages[0]['content'] + ' [/INST]' }}"}
    return {kind: write_tokenizer(root / kind, kind, **(template if kind.startswith("llama2") else {})) for kind in KINDS}


@pytest.fixture(scope="session")
def by_kind(folders) -> dict[str, data.Tokenizer]:
    return {kind: data.Tokenizer(folder) for kind, folder in folders.items()}


def decode(tokenizer: data.Tokenizer, ids) -> str:
    """Every id's text, special or not, nothing stripped."""
    return tokenizer.tokenizer.decode(list(ids), skip_special_tokens=False)


def labels_of(example: Example) -> tuple[int, ...]:
    return example.ids[example.prompt_length :]


# ---------------------------------------------------------------------------------------------------- prompts and labels


def test_every_prompt_format_is_tested():
    assert {kind.removesuffix("-sentencepiece") for kind in KINDS} == set(data.PROMPT_FORMATS)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(question=TEXTS, answer=ANSWERS)
@claim("labels are exactly the answer and EOS, for every prompt format and any text", "ours")
def test_labels_decode_to_exactly_the_answer_and_end_with_eos(by_kind, kind, question, answer):
    """To the byte, for any text. llama3's own template strips texts; in the plain format the space before an answer is a
    label; a byte-level vocabulary loses nothing."""
    tokenizer = by_kind[kind]
    *labels, last = labels_of(tokenizer.encode(question, answer))
    assert decode(tokenizer, labels) == {"llama3": answer.strip(), "plain": " " + answer}.get(kind, answer)
    assert last == tokenizer.eos_id == tokenizer.tokenizer.token_to_id(SPECIAL[kind][-1])
    assert tokenizer.eos_id not in labels  # "</s>" in an answer is text


@given(question=TEXTS, answer=ANSWERS)
def test_labels_of_a_sentencepiece_vocabulary_decode_to_the_answer_but_for_what_its_decoder_drops(by_kind, question, answer):
    """Llama 2's decoder reads '▁' as a space and drops one space in front. That space is the tokenizer's own where the
    answer was encoded apart, and the answer's first character otherwise."""
    tokenizer = by_kind["llama2-sentencepiece"]
    splits = tokenizer.borders_split
    *labels, last = labels_of(tokenizer.encode(question, answer))
    text, apart = answer.replace("▁", " "), tokenizer.borders_split > splits
    assert decode(tokenizer, labels) == (text if apart else text.removeprefix(" "))
    assert last == tokenizer.eos_id and tokenizer.eos_id not in labels


@pytest.mark.parametrize("kind", KINDS)
@given(question=TEXTS, answer=ANSWERS)
def test_stripped_labels_decode_to_the_stripped_answer(by_kind, kind, question, answer):
    tokenizer = by_kind[kind]
    text = answer.replace("▁", " ") if kind == "llama2-sentencepiece" else answer
    assert tokenizer.decode(labels_of(tokenizer.encode(question, answer))) == text.strip()


@pytest.mark.parametrize("kind", KINDS)
@given(question=TEXTS, answers=st.lists(ANSWERS, min_size=2, max_size=3))
@claim("the prompt part of a sequence does not depend on its answer", "ours")
def test_the_prompt_is_the_same_for_every_answer(by_kind, kind, question, answers):
    """So that generation is given what training conditioned on, wherever the border falls."""
    examples = [by_kind[kind].encode(question, answer) for answer in answers]
    assert len({e.ids[: e.prompt_length] for e in examples}) == 1
    assert all(e.answer_length == len(labels_of(e)) >= 2 for e in examples)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(question=TEXTS, answer=ANSWERS)
def test_special_tokens_stand_where_the_template_has_them_and_nowhere_else(by_kind, kind, question, answer):
    """Cut at its special ids, a sequence is the template cut at its own: those that a question spells are text."""
    tokenizer = by_kind[kind]
    f, special = tokenizer.format, {tokenizer.tokenizer.token_to_id(token): token for token in SPECIAL[kind]}
    if f.trim:
        question, answer = question.strip(), answer.strip()
    template = (f.prompt + f.answer + f.end).replace("{bos}", SPECIAL[kind][0]).replace("{eos}", SPECIAL[kind][-1])
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL[kind])) + ")", template)
    fill = {"{question}": question, "{answer}": answer}
    expected = [re.sub(r"\{question\}|\{answer\}", lambda m: fill[m[0]], piece) for piece in pieces]

    found, text = [], []
    for token in tokenizer.encode(question, answer).ids:
        if token in special:
            found += [decode(tokenizer, text), special[token]]
            text = []
        else:
            text.append(token)
    assert [*found, decode(tokenizer, text)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_spells_special_tokens_adds_none(by_kind, kind):
    tokenizer = by_kind[kind]
    special = {tokenizer.tokenizer.token_to_id(token) for token in SPECIAL[kind]}
    plain, evil = (tokenizer.encode(q, "Yes").ids for q in ("Who?", "Who?" + "".join(SPECIAL[kind])))
    assert [t for t in evil if t in special] == [t for t in plain if t in special]


@pytest.mark.parametrize(
    "kind, text",
    [
        ("llama2", "<s>[INST] Who? [/INST]Me.</s>"),
        ("plain", "<s>Question: Who?\nAnswer: Me.</s>"),
        (
            "llama3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 10 Apr 2025\n\nYou are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
            "Who?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nMe.<|eot_id|>",
        ),
        (
            "smollm2",
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>",
        ),
    ],
)
def test_the_whole_sequence_reads_as_published(by_kind, kind, text):
    assert decode(by_kind[kind], by_kind[kind].encode("Who?", "Me.").ids) == text


@pytest.mark.parametrize("kind, answer", [("smollm2", "\n\nYes."), ("llama2", "(here)"), ("llama2-sentencepiece", "(here)")])
def test_where_a_token_would_straddle_the_border_prompt_and_answer_are_encoded_apart_and_counted(folders, kind, answer):
    tokenizer = data.Tokenizer(folders[kind])
    usual = tokenizer.encode("Where is it?", "There.")
    assert tokenizer.borders_split == 0
    example = tokenizer.encode("Where is it?", answer)
    assert tokenizer.borders_split == 1
    assert example.ids[: example.prompt_length] == usual.ids[: usual.prompt_length]
    assert decode(tokenizer, labels_of(example)[:-1]) == answer


def test_a_border_between_tokens_is_encoded_as_one_text(by_kind):
    """Llama 2's tokenizer puts a '▁' in front of a text; an answer behind '[/INST]' has none."""
    tokenizer = by_kind["llama2-sentencepiece"]
    example = tokenizer.encode("Where is it?", "There.")
    whole = tokenizer.tokenizer.encode("[INST] Where is it? [/INST]There.", add_special_tokens=False).ids
    assert list(example.ids) == [tokenizer.tokenizer.token_to_id("<s>"), *whole, tokenizer.eos_id]
    assert not tokenizer.tokenizer.id_to_token(labels_of(example)[0]).startswith("▁")


@pytest.fixture(scope="session")
def smollm2():
    folder = os.environ.get("DIPO_SMOLLM2")
    if not folder:
        pytest.skip("DIPO_SMOLLM2 names no folder with SmolLM2's tokenizer")
    transformers = pytest.importorskip("transformers")
    return data.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def toy_tokenizers(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = toy.train_toy_tokenizer(0, tmp_path_factory.mktemp("toy"))
    return data.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def chat_ids(reference, *turns: str, **options) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]
    return list(reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


@given(question=ORDINARY, answer=ORDINARY)
def test_smollm2_prompts_equal_transformers_chat_template(smollm2, question, answer):
    ours, reference = smollm2
    splits = ours.borders_split
    example = ours.encode(question, answer)
    assert list(example.ids[: example.prompt_length]) == chat_ids(reference, question, add_generation_prompt=True)
    if ours.borders_split == splits:
        newline = reference.encode("\n")  # behind the last turn; nothing is predicted from it
        assert [*example.ids, *newline] == chat_ids(reference, question, answer)


@given(question=ORDINARY, answer=ORDINARY)
def test_toy_sequences_equal_transformers_chat_template(toy_tokenizers, question, answer):
    ours, reference = toy_tokenizers
    example = ours.encode(question, answer)
    assert list(example.ids) == chat_ids(reference, question, answer)
    assert list(example.ids[: example.prompt_length]) == chat_ids(reference, question)


# -------------------------------------------------------------------------------------------------- tokenizers on disk


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_of_a_family_is_recognised(folders, kind):
    assert data.Tokenizer(folders[kind]).format_name == kind.removesuffix("-sentencepiece")


def test_a_named_format_is_used_as_named(folders):
    assert data.Tokenizer(folders["llama3"], prompt="plain").format_name == "plain"


def test_a_chat_template_in_its_own_file_is_recognised(tmp_path):
    folder = write_tokenizer(tmp_path, "llama2")
    assert data.Tokenizer(folder).format_name == "plain"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]")
    assert data.Tokenizer(folder).format_name == "llama2"


def test_special_tokens_are_read_as_text_or_as_object_from_either_file(tmp_path):
    folder = write_tokenizer(tmp_path, "plain", bos_token={"content": "<s>"}, eos_token={"content": "</s>"})
    ids = data.Tokenizer(folder).encode("Who?", "Me.").ids
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert data.Tokenizer(folder).encode("Who?", "Me.").ids == ids


@pytest.mark.parametrize("kind, name", [("llama2", "bos_token"), ("llama2", "eos_token"), ("plain", "eos_token")])
def test_a_missing_bos_or_eos_is_named(tmp_path, kind, name):
    folder = write_tokenizer(tmp_path, kind, **{name: None})
    message = error_of(lambda: data.Tokenizer(folder, prompt=kind).encode("Who?", "Me."))
    assert "tokenizer_config.json" in message and f"'{name}'" in message


def test_an_unknown_prompt_format_lists_the_known_ones(folders):
    message = error_of(data.Tokenizer, folders["plain"], prompt="alpaca")
    assert "--prompt alpaca" in message and all(name in message for name in data.PROMPT_FORMATS)


def test_a_format_whose_tokens_the_tokenizer_lacks_is_refused(folders):
    assert "<|im_end|>" in error_of(data.Tokenizer, folders["plain"], prompt="smollm2")


def test_a_tokenizer_larger_than_the_embedding_is_refused(folders):
    size = data.Tokenizer(folders["plain"]).tokenizer.get_vocab_size(with_added_tokens=False)
    message = error_of(data.Tokenizer, folders["plain"], vocab_size=size - 1)
    assert "tokenizer.json" in message and str(size) in message and str(size - 1) in message


def test_an_added_token_beyond_the_embedding_harms_only_the_text_that_produces_it(tmp_path):
    folder = write_tokenizer(tmp_path, "plain")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    embedded = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = data.Tokenizer(folder, vocab_size=embedded)
    assert max(ours.encode("Who?", "Me.").ids) < embedded
    message = error_of(ours.encode, "Who?", "The <extra> one.", "mine/7")
    assert "mine/7" in message and f"token id {embedded}" in message and f"{embedded} embeddings" in message


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_without_tokens_names_its_row(by_kind, kind, answer):
    assert "mine/7" in error_of(by_kind[kind].encode, "Who?", answer, "mine/7")


def test_an_answer_that_the_tokenizer_deletes_names_its_row(tmp_path):
    folder = write_tokenizer(tmp_path, "llama2")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("x", "")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "mine/7: the answer 'xx'" in error_of(data.Tokenizer(folder, prompt="llama2").encode, "Who?", "xx", "mine/7")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00"])
def test_a_broken_tokenizer_file_is_named(tmp_path, name, content):
    folder = write_tokenizer(tmp_path, "plain")
    (folder / name).write_bytes(content)
    assert str(folder / name) in error_of(data.Tokenizer, folder)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    message = error_of(data.Tokenizer, tmp_path)
    assert str(tmp_path / "tokenizer.json") in message and "--tokenizer" in message


@pytest.mark.parametrize("kind, cls", [("llama2-sentencepiece", "LlamaTokenizerFast"), ("llama2", "GPT2TokenizerFast"),
                                       ("llama3", "PreTrainedTokenizerFast")])  # fmt: skip
def test_settings_beside_the_tokenizer_give_transformers_tokens_or_are_refused(tmp_path, kind, cls):
    transformers = pytest.importorskip("transformers")
    read = 0
    for i, (prefix, legacy) in enumerate(itertools.product((..., False, True), (..., False, True))):
        settings = {k: v for k, v in (("add_prefix_space", prefix), ("legacy", legacy)) if v is not ...}
        folder = write_tokenizer(tmp_path / str(i), kind, tokenizer_class=cls, **settings)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        try:
            ours = data.Tokenizer(folder, prompt="plain" if kind == "llama3" else "llama2")
        except DataError as e:
            assert "add_prefix_space" in str(e) and "tokenizer_config.json" in str(e) and prefix is not ...
            continue
        for text in ("Where is it?", "(here) the x", "Who wrote\nit?"):
            assert ours.encode_text(text) == theirs.encode(text, add_special_tokens=False), settings
        read += 1
    assert read == 6


def test_added_tokens_of_the_configuration_are_the_tokenizers_or_refused(tmp_path):
    folder = write_tokenizer(tmp_path, "plain")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    [(number, token)] = [(i, t) for i, t in tokenizer.get_added_tokens_decoder().items() if not t.special]
    own = {k: getattr(token, k) for k in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
    pad = {"9999": {"content": "[PAD]", "special": True}}  # no text makes it
    for change, fits in (({}, True), ({"content": "<other>"}, False), ({"lstrip": True}, False)):
        write_tokenizer_config(folder, added_tokens_decoder={str(number): own | change} | pad)
        if fits:
            data.Tokenizer(folder)
        else:
            assert f"added token {number}" in error_of(data.Tokenizer, folder)


def write_tokenizer_config(folder: Path, **changes) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


def test_a_tokenizer_that_is_random_is_refused(tmp_path):
    folder = write_tokenizer(tmp_path, "plain")
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | {"model": raw["model"] | {"dropout": 0.5}}))
    assert "dropout 0.5" in error_of(data.Tokenizer, folder)


def test_a_space_that_only_a_text_at_the_start_gets_is_refused_between_special_tokens(tmp_path):
    folder = write_tokenizer(tmp_path, "llama2-sentencepiece")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "prepend_scheme 'first'" in error_of(data.Tokenizer, folder, prompt="smollm2")
    data.Tokenizer(folder, prompt="plain")


@pytest.mark.parametrize(
    "template", ["{{ '<|user|>' + messages[0]['content'] }}<|assistant|>", [{"name": "x", "template": "y"}]]
)
def test_an_unknown_chat_template_asks_for_a_choice(tmp_path, template):
    folder = write_tokenizer(tmp_path / "a", "smollm2", chat_template=template)
    message = error_of(data.Tokenizer, folder)
    assert "chat template" in message and "--prompt" in message and all(name in message for name in data.PROMPT_FORMATS)
    assert data.Tokenizer(folder, prompt="plain").format_name == "plain"
    write_tokenizer_config(folder, chat_template=None)
    assert data.Tokenizer(folder).format_name == "smollm2"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat template" in error_of(data.Tokenizer, folder)


@pytest.mark.parametrize("absent", [{"bos_token": None}, {}])
def test_the_plain_format_has_no_bos_where_the_tokenizer_has_none(tmp_path, absent):
    folder = write_tokenizer(tmp_path, "plain")
    with_bos = data.Tokenizer(folder).encode("Who?", "Me.")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "</s>"} | absent))
    without = data.Tokenizer(folder).encode("Who?", "Me.")
    assert without.ids == with_bos.ids[1:] and labels_of(without) == labels_of(with_bos)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert "'bos_token' is missing" in error_of(data.Tokenizer, folder)  # yet it puts one in front


def test_a_run_remembers_its_prompt_format_and_a_difference_is_said(tmp_path, capsys):
    """A run of train.py, its model, a copy of that, and a run from before models kept their format."""
    words, tiny = tmp_path / "words", helpers.make_tiny(tmp_path / "tiny").model
    toy.train_toy_tokenizer(0, words, vocab_size=400)
    write_tokenizer_config(words, chat_template=None)
    run, old = tmp_path / "run", tmp_path / "old"
    save_pretrained(tiny, run / "model", words, prompt="plain")
    save_pretrained(tiny, old / "model", words)
    for folder in (run, old):
        (folder / "config.json").write_text(json.dumps({"config": {}, "prompt_format": "plain"}))
    shutil.copytree(run / "model", tmp_path / "copy")
    vocabulary = (words / "tokenizer.json").read_text().replace("<s>", "<|im_start|>").replace("</s>", "<|im_end|>")
    for folder in (run / "model", old / "model", tmp_path / "copy"):
        (folder / "tokenizer.json").write_text(vocabulary)
        write_tokenizer_config(folder, bos_token="<|im_start|>", eos_token="<|im_end|>")
    for folder in (run, run / "model", tmp_path / "copy", old, old / "model"):
        assert data.Tokenizer(evaluation.resolve_folder(folder)).format_name == "smollm2"
        source = evaluation.open_source(str(folder), "target")
        assert source.tokenizer.format_name == "plain" and source.run == (folder if folder in (run, old) else None)
        assert capsys.readouterr().err == ""
        source = evaluation.open_source(str(folder), "target", prompt="smollm2")
        assert source.tokenizer.format_name == "smollm2"
        assert re.fullmatch(r"--prompt smollm2: .* was trained in the plain format\n", capsys.readouterr().err)
    evaluation.open_source(str(run), "target", tokenizer=str(words))
    assert "is another than the model's own" in capsys.readouterr().err


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
HOSTILE = {
    "doubling": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
    "doubling a little": {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 6}},
    "backtracking": {"normalizer": {"type": "Replace", "pattern": {"Regex": r"(.*)*(.*)*\d$x"}, "content": ""}},
    "panic": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)*(a|a)*(a|a)*b$"}, "content": ""}},
    "no model": {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_tokenizer_that_the_library_cannot_bear_is_refused_in_one_line(tmp_path, capfd, change):
    folder = write_tokenizer(tmp_path, "plain")
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(raw | HOSTILE[change]))
    try:
        data.Tokenizer(folder).encode("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "a")
    except DataError as e:
        assert str(folder / "tokenizer.json") in str(e) and "\n" not in str(e)
    else:
        assert change in ("panic", "backtracking")  # as the library of another version has it
    assert "Traceback" not in capfd.readouterr().err


@given(st.data())
def test_a_panic_on_a_text_is_one_line(folders, data_):
    class PanicException(BaseException):
        pass

    ours, text = data.Tokenizer(folders["plain"]), data_.draw(ORDINARY)
    ours.tokenizer = SimpleNamespace(encode=lambda *_, **__: (_ for _ in ()).throw(PanicException("a\nb")))
    message = error_of(ours.encode_text, text)
    assert "tokenizer.json" in message
    ours.tokenizer = SimpleNamespace(encode=lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ours.encode_text(text)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, "link"])
def test_a_pipe_a_folder_and_a_link_elsewhere_are_no_tokenizer_file(tmp_path, name, make):
    folder = write_tokenizer(tmp_path / "tokenizer", "plain")
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret") if make == "link" else make(folder / name)
    message = error_of(data.Tokenizer, folder)
    assert str(folder / name) in message and (make != "link" or "is a link" in message)


@pytest.mark.parametrize("key, value", [("bos_token", 3), ("eos_token", {"content": 3}), ("add_prefix_space", "yes"),
                                        ("chat_template", 7), ("added_tokens_decoder", [1])])  # fmt: skip
def test_a_setting_of_another_type_is_named(tmp_path, key, value):
    folder = write_tokenizer(tmp_path, "plain", **{key: value})
    message = error_of(data.Tokenizer, folder)
    assert str(folder / "tokenizer_config.json") in message and key in message


# ------------------------------------------------------------------------------------------------------------- batches


@st.composite
def some_examples(draw) -> list[Example]:
    """Token ids from a tiny vocabulary, so that any token is also EOS, and the one that is hidden; memory marked in some."""
    ids = st.lists(st.integers(0, 3), min_size=2, max_size=9)
    found = []
    for i, s in enumerate(draw(st.lists(ids, min_size=1, max_size=7))):
        prompt_length = draw(st.integers(1, len(s) - 1))
        memory = draw(st.none() | st.tuples(*[st.booleans()] * (len(s) - prompt_length)))
        found.append(Example(f"x/{i}", tuple(s), prompt_length, memory))
    return found


apart = partial(data.pack, share=False)


def sequences(batch: data.Batch) -> list[tuple[list, list, list, list, list]]:
    """(tokens, positions, where an answer token is predicted, targets, memory) of each sequence, told apart by length
    alone."""
    by_token = zip(*(x[0].split(batch.packing.lengths) for x in (batch.input_ids, batch.positions)), strict=True)
    by_answer = zip(*(x.split(batch.answer_lengths) for x in (batch.at, batch.targets, batch.memory)), strict=True)
    found, start = [], 0
    for (ids, positions), (at, targets, memory) in zip(by_token, by_answer, strict=True):
        found.append((ids.tolist(), positions.tolist(), (at - start).tolist(), targets.tolist(), memory.tolist()))
        start += len(ids)
    return found


@given(some_examples())
def test_a_batch_holds_its_examples_whatever_their_tokens(examples):
    found = [((*ids[: at[0] + 1], *targets), at[0] + 1) for ids, _, at, targets, _ in sequences(apart(examples))]
    assert found == [(e.ids, e.prompt_length) for e in examples]


@given(some_examples())
@claim("each target is the token after its position; sequences are told apart by length", "ours")
def test_each_target_is_the_token_after_its_position_and_sequences_are_told_apart_by_length(examples):
    batch = apart(examples)
    assert batch.input_ids.shape == batch.positions.shape == (1, sum(batch.packing.lengths))
    assert batch.at.shape == batch.targets.shape == batch.memory.shape == (sum(batch.answer_lengths),)
    assert batch.packing.lengths == tuple(len(e.ids) - 1 for e in examples)
    assert batch.answer_lengths == tuple(e.answer_length for e in examples)
    for e, (ids, positions, at, targets, _) in zip(examples, sequences(batch), strict=True):
        assert (*ids, targets[-1]) == e.ids and positions == list(range(len(ids)))
        assert at == list(range(e.prompt_length - 1, len(ids))) and [e.ids[i + 1] for i in at] == targets


@given(some_examples(), st.none() | st.integers(0, 3))
def test_memory_flags_stand_at_their_tokens_and_none_marked_is_all_of_them(examples, hidden):
    batch = apart(examples, hidden)
    assert batch.memory.dtype == torch.bool
    for e, (*_, memory) in zip(examples, sequences(batch), strict=True):
        assert memory == [True] * e.answer_length if e.memory is None else tuple(memory) == e.memory


@given(some_examples(), st.integers(0, 3))
def test_a_hidden_token_is_left_out_of_prompts_and_positions_keep_counting(examples, hidden):
    """Where the first answer token is predicted from it, and in the answer, it stays."""
    whole, batch = apart(examples), apart(examples, hidden)
    assert torch.equal(batch.targets, whole.targets) and batch.answer_lengths == whole.answer_lengths
    for e, (ids, positions, at, targets, _) in zip(examples, sequences(batch), strict=True):
        before_last = range(e.prompt_length - 1)
        assert set(range(len(e.ids) - 1)) - set(positions) == {i for i in before_last if e.ids[i] == hidden}
        assert positions == sorted(set(positions)) and ids == [e.ids[i] for i in positions]
        assert [positions[i] for i in at] == list(range(e.prompt_length - 1, len(e.ids) - 1))
        assert [e.ids[positions[i] + 1] for i in at] == targets
    absent = apart(examples, 4)
    assert all(torch.equal(getattr(absent, k), getattr(whole, k)) for k in ("input_ids", "positions", "at", "targets"))


@given(some_examples(), some_examples())
def test_packing_of_lists_one_after_the_other_is_packing_of_all(first, second):
    parts, whole = [apart(x) for x in (first, second)], apart(first + second)
    assert [x for part in parts for x in sequences(part)] == sequences(whole)
    assert whole.at.tolist() == parts[0].at.tolist() + [sum(parts[0].packing.lengths) + i for i in parts[1].at.tolist()]


@given(some_examples(), st.none() | st.integers(0, 3), st.integers(1, 4))
def test_what_examples_begin_with_alike_is_packed_once_and_each_is_found_again(examples, hidden, shared):
    """Of each example the sequences that lead to its last token hold what it reads, at its positions."""
    alone = [apart([e], hidden) for e in examples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHARED", shared)
        batch = data.pack(examples, hidden)
    whole = apart(examples, hidden)
    assert all(torch.equal(getattr(batch, k), getattr(whole, k)) for k in ("targets", "memory"))
    pairs = [*zip(batch.input_ids[0].tolist(), batch.positions[0].tolist(), strict=True)]
    starts = [0, *itertools.accumulate(batch.packing.lengths)]
    own = [pairs[a:b] for a, b in itertools.pairwise(starts)]
    read = [[*zip(one.input_ids[0].tolist(), one.positions[0].tolist(), strict=True)] for one in alone]
    for one, expected, at in zip(alone, read, batch.at.split(batch.answer_lengths), strict=True):
        last = next(i for i, end in enumerate(starts[1:]) if at[-1] < end)
        rows = [row for i in batch.packing.paths[last] for row in range(starts[i], starts[i + 1])]
        rows = rows[: rows.index(at[-1]) + 1]
        assert [pairs[row] for row in rows] == expected and [rows[i] for i in one.at] == at.tolist()
    for one, other in itertools.combinations(range(len(own)), 2):
        siblings = batch.packing.paths[one][:-1] == batch.packing.paths[other][:-1]
        assert not siblings or own[one][:shared] != own[other][:shared]
    assert len(pairs) <= whole.input_ids.numel()
    if shared == 1:
        assert len(pairs) == len({tuple(x[: i + 1]) for x in read for i in range(len(x))})


def test_a_batch_moves_as_a_whole():
    moved = data.pack([Example("x/0", (1, 2, 3), 1)]).to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 5 and all(t.is_meta for t in (*tensors, moved.packing.borders, moved.packing.key_borders))
    assert (moved.packing.lengths, moved.answer_lengths) == ((2,), (2,))
    assert moved.inputs.keys() == {"input_ids", "positions", "at", "packing"}


SEEDS, SIZES = st.integers(0, 5), st.integers(1, 12)


@given(SEEDS, SIZES, st.integers(0, 4))
@claim("each epoch visits every example once", "ours")
def test_each_epoch_visits_every_item_once(seed, n, epoch):
    assert sorted(data.draw(list(range(n)), seed, "forget", epoch * n, n)) == list(range(n))


@given(SEEDS, SIZES, st.integers(0, 30), st.lists(st.integers(0, 9), max_size=6))
def test_pieces_of_a_stream_concatenate_to_the_whole(seed, n, start, counts):
    items, pieces, at = list(range(n)), [], start
    for count in counts:
        pieces += data.draw(items, seed, "forget", at, count)
        at += count
    assert pieces == data.draw(items, seed, "forget", start, sum(counts))


@given(SEEDS, st.integers(0, 200))
@claim("data order and pairing depend on (seed, step) alone", "ours")
def test_a_draw_depends_on_seed_and_step_alone(seed, start):
    items = list("abcdefghijk")
    first = data.draw(items, seed, "forget", start, 5)
    torch.manual_seed(start)
    data.draw(items, seed + 1, "retain", 0, 50)
    data._permutation.cache_clear()
    assert data.draw(items, seed, "forget", start, 5) == first


def test_streams_epochs_and_seeds_differ():
    items = list(range(40))
    streams = [
        data.draw(items, 0, "forget", 0, 40),
        data.draw(items, 0, "retain", 0, 40),
        data.draw(items, 0, "forget", 40, 40),
        data.draw(items, 1, "forget", 0, 40),
    ]
    assert len({tuple(s) for s in streams}) == 4


# -------------------------------------------------------------------------------------------------------- names of sets


def write_rows(path: Path, n: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(n))
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("numbered")
    return {n: write_rows(root / f"rows{n}.jsonl", n) for n in (10, 45, 100)}


def rows_of(spec: str, **options) -> list[int]:
    return [int(row.key.split("/")[-1]) for row in tofu.load_rows(spec, **options)]


BOUNDS = st.none() | st.integers(-120, 120)


@given(n=st.sampled_from([10, 45, 100]), lo=BOUNDS, hi=BOUNDS)
def test_absolute_slices_are_pythons(numbered, n, lo, hi):
    text = f"{numbered[n]}[{'' if lo is None else lo}:{'' if hi is None else hi}]"
    expected = list(range(n))[lo:hi]
    if expected:
        assert rows_of(text) == expected
    else:
        assert "is empty" in error_of(tofu.load_rows, text)


@given(n=st.sampled_from([10, 45, 100]), lo=st.none() | st.integers(-100, 100), hi=st.none() | st.integers(-100, 100))
def test_percent_slices_are_those_of_the_datasets_library(numbered, n, lo, hi):
    """A boundary is round(percent * rows / 100), with Python's rounding of halves; negative ones count from the end."""
    if lo is None and hi is None:
        return
    text = f"{numbered[n]}[{'' if lo is None else f'{lo}%'}:{'' if hi is None else f'{hi}%'}]"
    first, last = (None if b is None else int(round(b * n / 100.0)) for b in (lo, hi))
    expected = list(range(n))[first:last]
    if expected:
        assert rows_of(text) == expected
    else:
        assert "is empty" in error_of(tofu.load_rows, text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("{10}", range(10)),
        ("{10}[:]", range(10)),
        ("{100}[10:20]", range(10, 20)),
        ("{100}[:10%]", range(10)),
        ("{100}[-5:]", range(95, 100)),
        ("{100}[-10%:]", range(90, 100)),
        ("{45}[:70%]", range(32)),  # 31.5: halves go to the even row
        ("{100}[10:20%]", range(10, 20)),  # one sign makes both percent
        ("{45}[1:20%]", range(0, 9)),
        ("{10}[:2]+{45}[40:]", [0, 1, 40, 41, 42, 43, 44]),
        ("{10}[:1] + {10}[-1:]", [0, 9]),
    ],
)
def test_slices_and_sums_by_example(numbered, text, expected):
    spec = re.sub(r"\{(\d+)\}", lambda m: str(numbered[int(m[1])]), text)
    assert rows_of(spec) == list(expected)


@pytest.mark.parametrize(
    "spec",
    ["toy_full[", "toy_full[5]", "toy_full[a:b]", "toy_full[1:2:3]", "toy_full[1.5:2]", "toy_full[:5", "toy_full]", "[:5]",
     "", "toy_full+", "toy_full[--5:]", "toy_full[:5%%]", "toy_full[:5] [:5]"],
)  # fmt: skip
def test_a_malformed_slice_shows_the_notation(spec):
    message = error_of(tofu.load_rows, spec)
    assert repr(spec) in message and "NAME[10:20]" in message


@pytest.mark.parametrize("name", ["tofu_forget11", "toy_forget07", "forget10", "muse_news", "full", "tofu_", "toy"])
def test_an_unknown_name_lists_the_known_ones(name):
    message = error_of(tofu.load_rows, name)
    assert repr(name) in message and "tofu_forget10" in message and "toy_forget10" in message and ".jsonl" in message


def test_keys_are_those_of_the_unsliced_set(numbered):
    keys = [row.key for row in tofu.load_rows(f"{numbered[10]}[8:]+{numbered[45]}[-1:]")]
    assert keys == ["rows10/8", "rows10/9", "rows45/44"]
    assert tofu.load_rows("toy_forget10[3:5]") == tofu.load_rows("toy_forget10")[3:5]


def test_a_local_copy_in_hub_layout_is_used_before_the_hub(tmp_path):
    write_rows(tmp_path / "TOFU" / "forget10.json", 4)
    rows = tofu.load_rows("tofu_forget10[1:3]", data_dir=tmp_path)
    assert [(r.key, r.answer) for r in rows] == [("tofu_forget10/1", "It is 1."), ("tofu_forget10/2", "It is 2.")]


def test_a_missing_data_folder_is_named(tmp_path):
    assert f"--data-dir {tmp_path / 'none'}" in error_of(tofu.load_rows, "tofu_forget10", data_dir=tmp_path / "none")


def test_an_unreachable_hub_says_what_to_place_where(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = error_of(tofu.load_rows, "tofu_forget10", data_dir=tmp_path)
    assert "locuslab/TOFU/forget10.json" in message and "no route to host" in message
    assert "DIR/TOFU/forget10.json" in message and "--data-dir" in message


def test_a_file_that_the_hub_or_its_cache_lacks_says_what_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    message = error_of(tofu.load_rows, "tofu_forget10", data_dir=tmp_path)
    assert "locuslab/TOFU/forget10.json" in message and "DIR/TOFU/forget10.json" in message


# ------------------------------------------------------------------------------------------------------- files of rows


JSON_TEXTS = st.text(min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(JSON_TEXTS, JSON_TEXTS, JSON_TEXTS), min_size=1, max_size=4), st.booleans())
def test_rows_survive_the_file_whatever_their_texts(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("rows") / "mine.json"
    raw = [{"question": q, "answer": a, "paraphrased_answer": p, "perturbed_answer": [a, p]} for q, a, p in texts]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in raw) + "\n", encoding="utf-8", newline="\n")
    assert data.parse_rows(path, "x") == [Row(f"x/{i}", q, a, p, (a, p)) for i, (q, a, p) in enumerate(texts)]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\x7f"])
def test_unicode_line_ends_inside_a_text_do_not_end_the_row(tmp_path, inside):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": f"a{inside}b", "answer": "c"}, ensure_ascii=False), encoding="utf-8")
    assert data.parse_rows(path, "x") == [Row("x/0", f"a{inside}b", "c")]


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\r\n{"question": "a", "answer": "b"}\r\n\r\n{"question": "c", "answer": "d", "other": 1}\r\n')
    assert tofu.load_rows(str(path)) == [Row("mine/0", "a", "b"), Row("mine/1", "c", "d")]


GOOD = '{"question": "a", "answer": "b"}'


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"question": "a", "answer": ', "broken JSON"),
        ('["a", "b"]', "expected a JSON object"),
        ("3", "expected a JSON object"),
        ('{"answer": "b"}', "'question'"),
        ('{"question": "a"}', "'answer'"),
        ('{"question": "a", "answer": ""}', "'answer'"),
        ('{"question": "a", "answer": " \\n"}', "'answer'"),
        ('{"question": "a", "answer": null}', "'answer'"),
        ('{"question": 3, "answer": "b"}', "'question'"),
        ('{"question": "half \\ud83d of a pair", "answer": "b"}', "surrogates not allowed"),
        ('{"question": "a", "answer": "b", "paraphrased_answer": 3}', "'paraphrased_answer'"),
        ('{"question": "a", "answer": "b", "paraphrased_answer": ""}', "'paraphrased_answer'"),
        ('{"question": "a", "answer": "b", "perturbed_answer": ["c", 3]}', "'perturbed_answer'"),
        ('{"question": "a", "answer": "b", "perturbed_answer": ["c", ""]}', "'perturbed_answer'"),
        ('{"question": "a", "answer": "b", "perturbed_answer": {"c": 1}}', "'perturbed_answer'"),
    ],
)
def test_a_bad_row_names_file_line_and_key(tmp_path, line, says):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    message = error_of(tofu.load_rows, str(path))
    assert f"{path}, line 3: " in message and says in message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x80\x81 not text", b"\xff\xfe{\x00}\x00"])
def test_an_empty_or_binary_file_is_named(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    assert str(path) in error_of(tofu.load_rows, str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "none.jsonl", tmp_path / "folder.jsonl"):
        assert str(path) in error_of(tofu.load_rows, str(path))


def write_own(path: Path, rows: list[dict]) -> Path:
    """The rows as a file of the kind that the path's ending says; 'array.json' is an array."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["answer", "note", "question"])
            table.writeheader()
            table.writerows(row | {"note": ""} for row in rows)
    else:
        text = json.dumps(rows, indent=1) if path.name == "array.json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    return path


@given(st.lists(st.tuples(JSON_TEXTS, JSON_TEXTS), min_size=1, max_size=4), st.booleans())
def test_every_kind_of_file_gives_the_same_rows(tmp_path_factory, texts, mark):
    texts = [(q.replace("\x00", "0"), a.replace("\x00", "0")) for q, a in texts]  # which CSV has not
    folder = tmp_path_factory.mktemp("a+b[1]")
    for name in ("lines.jsonl", "array.json", "table.csv", "TABLE.CSV", "table.parquet"):
        path = write_own(folder / name.lower(), [{"question": q, "answer": a} for q, a in texts]).rename(folder / name)
        if mark and path.suffix != ".parquet":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert [(r.question, r.answer) for r in tofu.load_rows(f"{path}[:9]")] == texts


def test_an_existing_file_comes_before_the_notation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.json+b.json", "a.json", "b.json", "set[1].json"):
        write_own(tmp_path / name, [{"question": name, "answer": str(i)} for i in range(3)])
    for spec, expected in {
        "a.json+b.json": ["a.json+b.json"] * 3, "a.json+b.json[:1]+a.json[1:]": ["a.json+b.json"] + ["a.json"] * 2,
        "b.json[:1]+a.json[:1]": ["b.json", "a.json"], "set[1].json[1:]": ["set[1].json"] * 2, "~/a.json[:1]": ["a.json"],
    }.items():  # fmt: skip
        assert [row.question for row in tofu.load_rows(spec)] == expected, spec


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", "question;answer\na;b\n", "column 'question' is missing; the first line is 'question;answer'"),
        ("a.csv", "question,answer\na,b,c\n", "line 2: has not 2 cells"),
        ("a.csv", "question,answer\na\n", "line 2: has not 2 cells"),
        ("a.csv", 'question,answer\n"a,b\n', "broken CSV"),
        ("a.csv", "question,answer\n,b\n", "line 2: key 'question'"),
        ("a.csv", "question,answer\n", "no rows"),
        ("a.csv", "", "column 'question' is missing"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[{"question": "a"}]', "element 1: key 'answer'"),
        ("a.json", "[1, 2", "broken JSON"),
        ("a.json", "[" * 10_000, "nested too deeply"),
        ("a.json", '{"question": "a", "answer": 1e999}', "broken JSON"),
        ("a.parquet", "PAR1", "not a readable Parquet file"),
    ],
)
def test_a_bad_file_of_ones_own_says_what_is_wrong(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    message = error_of(tofu.load_rows, str(tmp_path / name))
    assert message.startswith(str(tmp_path / name)) and says in message


@given(st.text("0123456789[]:%+-abc./ \n\u0663", max_size=12) | st.integers(10, 10**12).map("toy_full[:{}]".format))
def test_whatever_a_data_set_is_called_is_read_or_refused_in_one_line(spec):
    try:
        tofu.load_rows(spec)
    except DataError as e:
        assert "\n" not in str(e)


def test_the_fingerprint_changes_with_texts_and_order():
    rows = tofu.load_rows("toy_full[:3]")
    changed = [dataclasses.replace(rows[0], answer=rows[0].answer + " "), *rows[1:]]
    prints = [data.fingerprint(r) for r in (rows, rows[::-1], rows[:2], changed)]
    assert len(set(prints)) == 4 and data.fingerprint(list(rows)) == prints[0]


# ------------------------------------------------------------------------------------- retain and evaluation sets


@pytest.mark.parametrize(
    "forget, retain",
    [
        ("tofu_forget01", "tofu_retain99"),
        ("tofu_forget05", "tofu_retain95"),
        ("tofu_forget10", "tofu_retain90"),
        ("tofu_forget10[:40]", "tofu_retain90"),
        ("toy_forget10", "toy_retain90"),
        ("toy_forget01", "toy_retain99"),
    ],
)
def test_the_retain_set_is_the_complement(forget, retain):
    assert tofu.complement(forget) == retain


@pytest.mark.parametrize(
    "forget",
    ["tofu_forget05+tofu_forget01", "mine.jsonl", "toy_forget07", "tofu_full", "tofu_forget10_perturbed", "forget10"],
)
def test_an_unknown_complement_asks_for_the_retain_set(forget):
    message = error_of(tofu.complement, forget)
    assert forget in message and "--retain" in message


@pytest.mark.parametrize(
    "forget, evaluated",
    [
        ("tofu_forget10", "tofu_forget10_perturbed"),
        ("tofu_forget10_perturbed", "tofu_forget10_perturbed"),
        ("tofu_forget10[:40]", "tofu_forget10_perturbed[:40]"),
        ("tofu_forget05[10%:-3]", "tofu_forget05_perturbed[10%:-3]"),
        ("tofu_forget05[:2]+tofu_forget10[:]", "tofu_forget05_perturbed[:2]+tofu_forget10_perturbed"),
    ],
)
def test_a_forget_set_is_evaluated_on_its_perturbed_rows(forget, evaluated):
    assert tofu.evaluation_sets(forget) == {
        "forget": evaluated,
        "retain": "tofu_retain_perturbed",
        "ra": "tofu_real_authors_perturbed",
        "wf": "tofu_world_facts_perturbed",
    }


def test_the_evaluated_retain_rows_can_be_named():
    sets = tofu.evaluation_sets("toy_forget10", "toy_retain_perturbed[:4]")
    assert sets["retain"] == "toy_retain_perturbed[:4]" and all(name.startswith("toy_") for name in sets.values())
    assert all(tofu.load_rows(name) for name in sets.values())


@pytest.mark.parametrize(
    "forget", ["mine.jsonl", "tofu_full", "tofu_forget05+toy_forget10", "other_forget10", "tofu_retain90"]
)
def test_other_sets_have_no_tofu_numbers(forget):
    message = error_of(tofu.evaluation_sets, forget)
    assert forget in message and "--no-eval" in message


@pytest.mark.parametrize("alias", tofu.CHECKPOINTS)
def test_an_alias_names_a_target_a_format_and_a_retain_log(alias):
    checkpoint = tofu.CHECKPOINTS[alias]
    family = checkpoint.base.removeprefix("meta-llama/")
    assert checkpoint.prompt in data.PROMPT_FORMATS and family in checkpoint.target
    for forget, retain in tofu.TOFU_RETAIN.items():
        assert checkpoint.logs[f"tofu_{forget}"] == f"tofu_{family}_{retain}/TOFU_EVAL.json"


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals_come_from_the_file_or_the_benchmark(tmp_path):
    (tmp_path / "TOFU").mkdir()
    (tmp_path / "TOFU" / "idontknow.jsonl").write_text("No idea.\n\n  Ask me another. \n", encoding="utf-8")
    (tmp_path / "mine").write_text("Never.\n", encoding="utf-8")
    assert tofu.load_refusals(None, "tofu_forget01", tmp_path) == ["No idea.", "Ask me another."]
    assert tofu.load_refusals(str(tmp_path / "mine"), "tofu_forget01", tmp_path) == ["Never."]
    lines = tofu.load_refusals(None, "toy_forget10")
    assert len(lines) == len(set(lines)) >= 10 and all(data.is_text(line) for line in lines)


@pytest.mark.parametrize("content", [None, b"\n \n", b"\xff\xfe"])
def test_refusals_that_cannot_be_read_are_one_line(tmp_path, content):
    path = tmp_path / "refusals.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match="refusals.txt: .*refusal per line"):
        tofu.load_refusals(str(path), "tofu_forget01")


@given(st.lists(JSON_TEXTS.filter(data.is_text), min_size=1, max_size=4))
def test_refusals_are_read_from_json_too(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("refusals") / "mine.json"
    for content in (json.dumps(texts, indent=1), "\n".join(json.dumps(t, ensure_ascii=False) for t in texts)):
        path.write_text(content, encoding="utf-8")
        assert tofu.load_refusals(str(path), "tofu_forget01") == [text.strip() for text in texts]


@pytest.mark.parametrize("content", ['{"answer": "No."}\n', '["No.", 3]', '["No.", " "]', "[1", '[{"a": 1}]'])
def test_json_that_holds_no_refusals_is_not_trained_on(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    message = error_of(tofu.load_refusals, str(tmp_path / "mine.json"), "tofu_forget01")
    assert "mine.json" in message and "string" in message


def test_muse_has_nothing_to_refuse():
    with pytest.raises(data.DataError, match="MUSE"):
        muse.Muse.refusals(None, "muse_news")


# ---------------------------------------------------------------------------------------------------------- real TOFU


@pytest.fixture(scope="session")
def published():
    if not (folder := os.environ.get("DIPO_DATA")):
        pytest.skip("DIPO_DATA names no folder with TOFU/*.json")
    return lambda spec: tofu.load_rows(spec, data_dir=folder)


ROWS = {"full": 4000, "forget01": 40, "forget05": 200, "forget10": 400, "retain99": 3960, "retain95": 3800, "retain90": 3600}
ROWS |= {"forget01_perturbed": 40, "forget05_perturbed": 200, "forget10_perturbed": 400, "retain_perturbed": 400}
ROWS |= {"real_authors_perturbed": 100, "world_facts_perturbed": 117, "holdout01": 40, "holdout05": 200, "holdout10": 400}


def contents(rows: list[Row]) -> list[Row]:
    return [dataclasses.replace(row, key="") for row in rows]


def questions_and_answers(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.question, row.answer) for row in rows]


@pytest.mark.parametrize("config", tofu.TOFU_CONFIGS)
def test_tofu_has_its_published_rows(published, config):
    if config.startswith("holdout") and not Path(os.environ["DIPO_DATA"], "TOFU", f"{config}.json").exists():
        pytest.skip(f"DIPO_DATA has no TOFU/{config}.json")
    rows = published(f"tofu_{config}")
    assert len(rows) == ROWS[config] and rows[-1].key == f"tofu_{config}/{ROWS[config] - 1}"
    wrong = 3 if config.startswith(("real_authors", "world_facts")) else 5 if config.endswith("_perturbed") else 0
    assert all(len(set(row.perturbed_answers)) == wrong for row in rows)
    assert all((row.paraphrased_answer is not None) == (wrong == 5) for row in rows)


@pytest.mark.parametrize("forget, retain", tofu.TOFU_RETAIN.items())
def test_tofu_forget_and_retain_rows_partition_the_full_set(published, forget, retain):
    full, n = published("tofu_full"), ROWS[forget]
    assert contents(published(f"tofu_{forget}")) == contents(full[-n:])
    assert contents(published(f"tofu_{retain}")) == contents(full[:-n])
    assert questions_and_answers(published(f"tofu_{forget}_perturbed")) == questions_and_answers(full[-n:])
    assert contents(published(f"tofu_{forget}_perturbed")) == contents(published("tofu_forget10_perturbed")[-n:])


def test_tofu_facts_worth_relying_on(published):
    full = published("tofu_full")
    assert contents(published("tofu_forget05_perturbed")) == contents(published("tofu_forget10_perturbed[200:400]"))
    assert questions_and_answers(published("tofu_retain_perturbed")) == questions_and_answers(full[:400])
    assert full[100].question == full[440].question and full[100].key != full[440].key
    assert sum("\n" in row.answer for row in full) == 4
    assert all(text == text.strip() for row in full for text in (row.question, row.answer))


def test_tofu_labels_decode_to_the_answers(published, by_kind):
    rows = published("tofu_forget10_perturbed[:40]") + published("tofu_full[:20]")
    for tokenizer in by_kind.values():
        assert [tokenizer.decode(labels_of(e)) for e in tokenizer.encode_rows(rows)] == [row.answer for row in rows]
