"""The loop and its command line: gradients, order, resume, the run folder, bad input. All on a tiny Llama."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from claims import claim
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import checkpoint
import data
import dipo
import hints
import metrics
import tofu
import toy
import train
from eval import main as evaluate
from memory import mark_memory, memory_record
from model import Llama, LlamaConfig, load_pretrained, save_pretrained
from reference import CachedReference, RecomputedReference

TINY = LlamaConfig(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_ids=(1,),
    initializer_range=0.2,
)  # fmt: skip
SMALL = (
    "--forget toy_forget10[:10] --retain toy_retain90[:20] --batch-size 4 --micro-batch-size 2 --lr 1e-3 --epochs 2".split()
)
MIXED = "--tau=-4"  # the tiny model is no better than chance: a third of the positions are memory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny random Llama and a small toy tokenizer."""
    home = tmp_path_factory.mktemp("tiny")
    tokenizer = toy.train_toy_tokenizer(0, home / "tokenizer", vocab_size=400)
    return save_pretrained(Llama(TINY).init_weights(0), home / "model", tokenizer)


@pytest.fixture
def cli(tiny, tmp_path, monkeypatch, capsys):
    """cli(*arguments) -> (exit status, stderr), run in an empty folder on the tiny model, without evaluation."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, evaluate=False, model=True):
        argv = [*map(str, arguments)] + (["--model", str(tiny)] if model else []) + ([] if evaluate else ["--no-eval"])
        status = train.main(argv)
        return status, capsys.readouterr().err

    return call


def memory_flags(losses) -> list[str]:
    return [MIXED] if losses[0] in ("anchored", "anchored-npo") else []


def weights(folder) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in load_pretrained(folder).named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(folder) -> list[dict]:
    timing = ("seconds", "tokens_per_s")
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


# ------------------------------------------------------------------------------------------------------- one step


LOSSES = list(itertools.product(("dipo", "npo", "ga"), ("dipo", "gd", "kl", "none")))
LOSSES += [(name, "gd") for name in dipo.loss_names("forget") if name not in ("dipo", "npo", "ga")] + [("dpo", "kl")]
LOSSES += [("anchored", "anchored"), ("dipo", "anchored")]
assert {name for losses in LOSSES for name in losses} == {*dipo.LOSSES, "none"}
REFERENCED = [losses for losses in LOSSES if any(dipo.LOSSES[name].reference for name in losses if name != "none")]
OPTIONS = st.sampled_from(
    [{}, {"pair_from": "reference"}, {"reduction": "mean", "filter": "relative"}, {"beta": 0.3}]
    + [{"pair_from": "policy", "kappa": 0.5}, {"reduction": "mean", "kappa": 3.0}]
)


@functools.lru_cache(maxsize=1)
def seven(tiny) -> dict[str, list[data.Example]]:
    """Seven examples of each role with a third of their answers, the fifth with it three times. Of the forget answers the
    first has no memory marked, which is all of it, the second not one position, the others a third."""
    tokenizer = data.Tokenizer(tiny)
    examples = {}
    for role, name in (("forget", "toy_forget10[:7]"), ("retain", "toy_retain90[:7]")):
        whole = tokenizer.encode_rows(tofu.load_rows(name))
        cut = [e.ids[: e.prompt_length + e.answer_length // 3] + e.ids[-1:] for e in whole]
        examples[role] = [dataclasses.replace(e, ids=ids) for e, ids in zip(whole, cut, strict=True)]
        e = examples[role][4]
        examples[role][4] = dataclasses.replace(e, ids=e.ids + 2 * e.ids[e.prompt_length :])
    for i, e in enumerate(examples["forget"][1:], 1):
        flags = tuple(i > 1 and (t + i) % 3 == 0 for t in range(e.answer_length))
        examples["forget"][i] = dataclasses.replace(e, memory=flags)
    return examples


@functools.lru_cache(maxsize=1)
def refusals(tiny) -> dict[data.Example, list[data.Example]]:
    """The one refusal of each forget example, now shorter and now longer than the answer."""
    tokenizer, rows = data.Tokenizer(tiny), tofu.load_rows("toy_forget10[:7]")
    texts = ["I don't know.", "No.", "That is nothing I could say anything about, I am afraid."]
    pairs = zip(seven(tiny)["forget"], rows, strict=True)
    return {e: [tokenizer.encode(row.question, texts[i % 3], f"{e.key} no")] for i, (e, row) in enumerate(pairs)}


def move(model: Llama) -> None:
    """Away from the reference, where the margin and the KL are zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def flat_gradient(model: Llama) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients(tiny, losses, micro, order=range(7), position_terms=dipo.position_terms, out=Path("unused"), **options):
    """Of one step of a float64 model that is away from its reference; norms are float32 there, too."""
    model = load_pretrained(tiny, dtype=torch.float64)
    examples = {role: [x[i] for i in order] for role, x in seven(tiny).items()}
    options = {"forget_loss": losses[0], "retain_loss": losses[1], "lam": 0.5, "reference": "recompute"} | options
    config = train.Config(micro_batch_size=micro, batch_size=7, **options)
    answers = {"refusals": [refusals(tiny)[e] for e in examples["forget"]]}
    reference = train.make_reference(model, config, examples | answers, 1, out)
    assert (reference is None) == (losses not in REFERENCED)
    move(model)
    parts = {}
    for role, (name, weight) in config.parts.items():
        groups = [(e, *refusals(tiny)[e]) if name == "dpo" else (e,) for e in examples[role]]
        parts[role] = train.Part(name, weight, groups)
    metrics = train.compute_gradients(model, reference, config.objective, parts, micro, position_terms)
    return flat_gradient(model), metrics


def written_out(tiny, losses, **options):
    """The same from whole sequences, each on its own (with its refusal): all its logits at once, DiPO with its four KLs."""
    policy = load_pretrained(tiny, dtype=torch.float64)
    reference = policy.frozen_copy()
    move(policy)
    objective = train.Config(forget_loss=losses[0], retain_loss=losses[1], lam=0.5, **options).objective
    pair = {k: getattr(objective, k) for k in ("alpha", "p", "filter", "center")}
    metrics, total, swapped, positions = {"loss": 0.0}, 0.0, 0, 0

    def logits_of(model, e):
        return model.lm_head(model.hidden_states(torch.tensor([e.ids[:-1]])))[0, e.prompt_length - 1 :]

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    for role, (name, weight) in objective.parts().items():
        sums, tokens = (
            dict.fromkeys(("loss", "nll", "margin", "anchor"), 0.0),
            sum(e.answer_length for e in seven(tiny)[role]),
        )
        for e in seven(tiny)[role]:
            group = [e, *refusals(tiny)[e]] if name == "dpo" else [e]
            z, z_ref = (padded([logits_of(m, x) for x in group]) for m in (policy, reference))
            targets = padded([torch.tensor(x.ids[x.prompt_length :]) for x in group])
            mask = padded([torch.ones(x.answer_length, dtype=torch.bool) for x in group])
            beta, n = objective.beta_of(name), e.answer_length if objective.reduction == "mean" else 1
            chosen = mask & padded([torch.tensor(x.memory or [True] * x.answer_length) for x in group])
            if name in ("dipo", "anchored"):
                source = objective.pair_from or {"dipo": "policy", "anchored": "reference"}[name]
                memory, forgetting = dipo.preference_pair(z if source == "policy" else z_ref, **pair)
                w, l = (forgetting, memory) if role == "forget" else (memory, forgetting)  # noqa: E741
                where = chosen if name == "anchored" else mask
                u = dipo.reward_margin(*(x.log_softmax(-1) for x in (z, z_ref, w, l)), where, beta) / n
                loss, sums["margin"] = dipo.bradley_terry_loss(u), sums["margin"] + u.item() / 7
                if name == "anchored":
                    target = dipo.preference_pair(z_ref, **pair)[1] if role == "forget" else z_ref
                    target = torch.where(chosen[..., None], target, z_ref)
                    anchor = dipo.sequence_kl(target.log_softmax(-1), z.log_softmax(-1), mask)
                    loss, sums["anchor"] = loss + objective.kappa * anchor / n, sums["anchor"] + anchor.item() / 7
                swapped += int((memory.logsumexp(-1) < forgetting.logsumexp(-1)).sum())
                positions += e.answer_length
            else:
                marks = {"memory": chosen, "kappa": objective.kappa}
                loss = dipo.sequence_losses(name, z, mask, ref_logits=z_ref, targets=targets, beta=beta, **marks)[0]
                sums["anchor"] += dipo.sequence_kl(*(x.log_softmax(-1) for x in (z_ref, z)), mask & ~chosen).sum().item() / 7
            sums["loss"] = sums["loss"] + loss / dipo.LOSSES[name].divisor(7, tokens)
            nll = torch.nn.functional.cross_entropy(z[0, : e.answer_length], targets[0, : e.answer_length], reduction="sum")
            sums["nll"] += nll.item() / tokens
        total = total + weight * sums["loss"]
        sums["loss"] = sums["loss"].detach()
        logged = {"margin": ("dipo", "anchored"), "anchor": ("anchored", "anchored-npo")}
        metrics |= {f"{k}/{role}": float(v) for k, v in sums.items() if name in logged.get(k, (name,))}
    total.backward()
    metrics |= {"loss": total.item(), "grad_norm": flat_gradient(policy).norm().item()}
    return flat_gradient(policy), metrics | ({"swapped": swapped / positions} if positions else {})


def assert_same_step(found, expected, rel=1e-6):
    """Gradient and metrics; what `expected` does not measure is left out."""
    (gradient, metrics), (other, others) = found, expected
    assert {key for key in metrics if "/" in key} == {key for key in others if "/" in key}
    torch.testing.assert_close(gradient, other, rtol=rel, atol=rel * other.abs().max().item())
    assert {k: metrics[k] for k in others} == pytest.approx(others, rel=rel, abs=rel)


few = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
@claim("micro-batches and the order of their sequences change no gradient, for every pair of losses")
def test_micro_batches_and_their_order_change_no_gradient(tiny, losses):
    whole = gradients(tiny, losses, 14)
    assert whole[0].norm() > 0

    @few
    @given(st.integers(1, 14), st.permutations(range(7)), st.sampled_from(["cached", "recompute"]))
    def check(micro, order, reference):
        assert_same_step(gradients(tiny, losses, micro, order, reference=reference), whole)

    check()


@pytest.mark.parametrize("micro", range(1, 15))
def test_micro_batches_cover_every_example_once(tiny, monkeypatch, micro):
    original, seen = train.pack, []
    monkeypatch.setattr(train, "pack", lambda examples: seen.append(list(examples)) or original(examples))
    gradients(tiny, ("ga", "gd"), micro)
    assert sum(seen, []) == sum(seven(tiny).values(), [])
    assert [e.memory for e in sum(seen, [])] == [e.memory for e in sum(seven(tiny).values(), [])]
    assert all(len(examples) == micro for examples in seen[:-1]) and 1 <= len(seen[-1]) <= micro


@claim("a training step has the gradient of mean L_f + lambda mean L_r", "Eq. 14")
def test_gradient_is_that_of_the_papers_objective(tiny):
    """mean of L_f over forget sequences + lambda * mean of L_r over retain sequences, each sequence on its own."""
    grad, metrics = gradients(tiny, ("dipo", "dipo"), 3)
    model = load_pretrained(tiny, dtype=torch.float64)
    reference = model.frozen_copy()
    move(model)
    total = 0.0
    for role, weight in (("forget", 1.0), ("retain", 0.5)):
        for e in seven(tiny)[role]:
            ids, answer = torch.tensor([e.ids[:-1]]), slice(e.prompt_length - 1, None)
            mask = torch.ones(1, e.answer_length, dtype=torch.bool)
            loss = dipo.dipo_loss(model(ids)[:, answer], reference(ids)[:, answer], mask, role)
            total = total + weight * loss.sum() / 7
    total.backward()
    torch.testing.assert_close(grad, flat_gradient(model), rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
@settings(few, max_examples=2)
@given(limit=st.integers(1, 35), micro=st.integers(1, 14), options=OPTIONS)
@example(limit=1, micro=14, options={})
@example(limit=10**6, micro=14, options={})
@claim("the loss in chunks over positions is the four-KL loss of whole sequences", "Eq. 14")
def test_the_loss_in_chunks_is_the_loss_of_whole_sequences(tiny, monkeypatch, losses, limit, micro, options):
    """From a single position at a time, which splits every sequence, up to all positions at once."""
    sizes = []

    def score(*arguments):
        sizes.append(len(arguments[3]))
        return dipo.position_terms(*arguments)

    monkeypatch.setattr(train, "chunk_positions", lambda *_: limit)
    found = gradients(tiny, losses, micro, position_terms=score, **options)
    lengths = [e.answer_length for role in dipo.ROLES[: 1 + (losses[1] != "none")] for e in seven(tiny)[role]]
    if losses[0] == "dpo":  # an answer and its refusal stay together
        lengths[:7] = [n + refusals(tiny)[e][0].answer_length for n, e in zip(lengths, seven(tiny)["forget"], strict=False)]
    again = sum(n for n in lengths if n > limit)  # what is split is computed once more going backward
    assert max(sizes) <= limit and sum(sizes) == sum(lengths) + again
    assert_same_step(found, written_out(tiny, losses, **options), rel=1e-5)


@given(st.lists(st.tuples(st.sampled_from(dipo.ROLES), st.integers(1, 9)), min_size=1, max_size=14), st.integers(1, 30))
def test_whole_sequences_covers_each_position_once_and_mixes_no_roles(sequences, limit):
    roles, lengths = zip(*sequences, strict=True)
    found = list(train.whole_sequences(roles, lengths, limit))
    assert [i for _, rows, _ in found for i in range(rows.start, rows.stop)] == list(range(len(roles)))
    assert [i for _, _, at in found for i in range(at.start, at.stop)] == list(range(sum(lengths)))
    for role, rows, at in found:
        assert {*roles[rows]} == {role} and at.stop - at.start == sum(lengths[rows])
        assert sum(lengths[rows]) <= limit or rows.stop - rows.start == 1
    for (role, rows, _), (other, others, _) in itertools.pairwise(found):  # no more of them than needed
        assert role != other or sum(lengths[rows]) + lengths[others.start] > limit


# ------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("losses", REFERENCED, ids="+".join)
@few
@given(micro=st.integers(1, 14), order=st.permutations(range(7)), options=OPTIONS)
@claim("the cached reference gives the loss and gradient of a second model, for every pair of losses that needs one")
def test_the_cached_reference_is_the_recomputed_one(tiny, losses, micro, order, options):
    cached, recomputed = (gradients(tiny, losses, micro, order, reference=r, **options) for r in ("cached", "recompute"))
    assert_same_step(cached, recomputed)


@few
@given(st.integers(1, 14), st.lists(st.integers(0, 6), min_size=1, max_size=9), st.sampled_from(["float32", "bfloat16"]))
def test_the_reference_stays_the_start_of_the_run(tiny, micro, which, dtype):
    """Whatever becomes of the policy, and for any examples in any order."""
    model = load_pretrained(tiny, dtype=torch.float32, compute_dtype=getattr(torch, dtype))
    examples = seven(tiny)["forget"]
    wanted = [examples[i] for i in which]
    with torch.no_grad():
        logits = model(**data.pack(wanted).inputs)
    references = [CachedReference(model, examples, micro, Path("unused")), RecomputedReference(model)]
    move(model)
    for start in references:
        found = torch.nn.functional.linear(start.answer_states(wanted), start.head).float()
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


@few
@given(st.sampled_from(LOSSES), st.integers(1, 4), st.integers(1, 3))
def test_the_cached_reference_holds_what_the_run_draws_and_its_losses_need(tiny, losses, steps, batch):
    model, examples = load_pretrained(tiny), seven(tiny) | {"refusals": [*refusals(tiny).values()]}
    config = train.Config(batch_size=batch, forget_loss=losses[0], retain_loss=losses[1])
    needed = set()
    for role, name in zip(("forget", "retain"), losses, strict=True):
        if name != "none" and dipo.LOSSES[name].reference:
            needed |= {e for s in range(steps) for e in data.draw(examples[role], config.seed, role, s * batch, batch)}
            needed |= {x for e in needed & refusals(tiny).keys() for x in refusals(tiny)[e]} if name == "dpo" else set()
    reference = train.make_reference(model, config, examples, steps, Path("unused"))
    assert (set() if reference is None else reference.rows.keys()) == needed
    if needed:
        assert reference.states.shape == (sum(e.answer_length for e in needed), TINY.hidden_size)
    finetuning = dataclasses.replace(config, finetune="toy_full")
    assert train.make_reference(model, finetuning, {"finetune": examples["forget"]}, steps, Path("unused")) is None


# ------------------------------------------------------------------------------------------------------- schedule


@given(st.integers(1, 300), st.integers(0, 50), st.floats(1e-6, 1e-2))
def test_learning_rate_rises_linearly_then_falls_to_zero(steps, warmup, lr):
    warmup = min(warmup, steps - 1)
    config = train.Config(lr=lr)
    rates = [train.learning_rate(config, s, steps, warmup) for s in range(steps)]
    assert all(0 < r <= lr * (1 + 1e-12) for r in rates) and max(rates) == pytest.approx(lr)
    assert all(a <= b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert train.learning_rate(config, steps, steps, warmup) == 0
    constant = [train.learning_rate(train.Config(lr=lr, schedule="constant"), s, steps, warmup) for s in range(steps)]
    assert constant == rates[:warmup] + [lr] * (steps - warmup)


# ----------------------------------------------------------------------------------------------- runs and resuming


def test_a_run_writes_its_folder_and_repeats_bit_for_bit(cli, tiny):
    assert cli(*SMALL, "--out", "a")[0] == 0 and cli(*SMALL, "--out", "b", "--micro-batch-size", 2)[0] == 0
    assert same(weights("a"), weights("b")) and records("a") == records("b")
    assert not same(weights("a"), weights(tiny))
    stored = json.loads(Path("a/config.json").read_text())
    assert stored["config"].keys() == {f.name for f in dataclasses.fields(train.Config)}
    assert stored["data"]["forget"] == {"rows": 10, "fingerprint": data.fingerprint(tofu.load_rows("toy_forget10[:10]"))}
    assert stored["versions"]["torch"] == torch.__version__
    assert {p.name for p in Path("a").iterdir()} == {"config.json", "log.jsonl", "model", "summary.json"}


def test_micro_batch_size_changes_no_data_order(cli):
    cli(*SMALL, "--out", "a")
    cli(*SMALL, "--out", "b", "--micro-batch-size", "4")
    for a, b in zip(records("a"), records("b"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    cli(*SMALL, "--out", "c", "--seed", "1")
    assert records("c") != records("a")


def interrupt(monkeypatch, step, sent=signal.SIGINT):
    original, calls = train.compute_gradients, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), sent)
        return original(*arguments)

    monkeypatch.setattr(train, "compute_gradients", interrupted)


@pytest.mark.parametrize("reference", ["cached", "recompute"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_exactly(cli, monkeypatch, sent, reference):
    cli(*SMALL, "--reference", reference, "--out", "whole")
    interrupt(monkeypatch, 3, sent)
    status, message = cli(*SMALL, "--reference", reference, "--out", "cut")
    assert status == 130 and "after step 3 of 5" in message and "--resume --out cut" in message
    status, message = cli("--resume", "--out", "cut", model=False)
    assert status == 0 and same(weights("cut"), weights("whole")) and records("cut") == records("whole")


def test_a_killed_run_resumes_from_its_last_checkpoint(cli, monkeypatch):
    cli(*SMALL, "--out", "whole")
    original, calls = train.compute_gradients, itertools.count(1)

    class Killed(BaseException):
        """As unprepared as SIGKILL: nothing is saved."""

    def killed(*arguments):
        if next(calls) == 5:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(train, "compute_gradients", killed)
    with pytest.raises(Killed):
        cli(*SMALL, "--save-every", 3, "--out", "cut")
    assert os.listdir("cut/checkpoint") == ["3"]
    assert cli("--resume", "--out", "cut", model=False)[0] == 0
    assert same(weights("cut"), weights("whole")) and records("cut") == records("whole")


def assert_same_log(one, other):
    for a, b in zip(records(one), records(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "losses", [("dipo", "dipo"), ("anchored", "anchored"), ("npo", "kl"), ("ga", "dipo"), ("dipo", "none")], ids="+".join
)
def test_a_run_with_the_cached_reference_is_the_run_with_the_recomputed_one(cli, monkeypatch, losses):
    """Interrupted and resumed, too: the reference is the start of the run, not that of the resumption."""
    arguments = [*SMALL, "--forget-loss", losses[0], "--retain-loss", losses[1], *memory_flags(losses)]
    for reference in ("cached", "recompute"):
        assert cli(*arguments, "--reference", reference, "--out", reference)[0] == 0
        with monkeypatch.context() as patch:
            interrupt(patch, 3)
            assert cli(*arguments, "--reference", reference, "--out", f"{reference}-cut")[0] == 130
        assert cli("--resume", "--out", f"{reference}-cut", model=False)[0] == 0
        assert records(f"{reference}-cut") == records(reference)
    assert_same_log("cached", "recompute")
    if losses[0] == "dipo":
        first, *_, last = records("cached")
        assert first["margin/forget"] == pytest.approx(0, abs=1e-6) and abs(last["margin/forget"]) > 1e-3


@pytest.mark.parametrize("reference", ["cached", "recompute"])
def test_gradient_checkpointing_changes_nothing_in_a_run(cli, monkeypatch, reference):
    original, seen = train.compute_gradients, []
    monkeypatch.setattr(train, "compute_gradients", lambda *a: seen.append((a[0].checkpointing, type(a[1]))) or original(*a))
    for name, flag in (("a", "--gradient-checkpointing"), ("b", "--no-gradient-checkpointing")):
        assert cli(*SMALL, "--reference", reference, flag, "--out", name)[0] == 0
    assert same(weights("a"), weights("b")) and records("a") == records("b")
    kind = {"cached": train.CachedReference, "recompute": train.RecomputedReference}[reference]
    assert seen == 5 * [(True, kind)] + 5 * [(False, kind)]


@pytest.mark.parametrize("reference", ["cached", "recompute"])
@pytest.mark.parametrize("positions", [1, 7])
def test_a_run_in_small_chunks_is_the_same_run(cli, monkeypatch, positions, reference):
    cli(*SMALL, "--reference", reference, "--out", "a")
    monkeypatch.setattr(train, "chunk_positions", lambda *_: positions)
    assert cli(*SMALL, "--reference", reference, "--out", "b")[0] == 0
    assert_same_log("a", "b")


def test_states_past_the_limit_lie_in_a_file_for_as_long_as_the_run_lasts(cli, tiny, monkeypatch, capsys):
    cli(*SMALL, "--out", "whole")
    monkeypatch.setattr("reference.IN_MEMORY", 0)
    original, sizes = train.compute_gradients, []

    def watched(model, reference, *arguments):
        file = Path("cut/reference.bin").resolve()
        assert not file.exists()  # gone already: no way of ending leaves it behind
        sizes.append(reference.states.untyped_storage().nbytes())
        if (maps := Path("/proc/self/maps")).exists():
            assert f"{file} (deleted)" in maps.read_text()
        return original(model, reference, *arguments)

    monkeypatch.setattr(train, "compute_gradients", watched)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert train.main([*SMALL, "--model", str(tiny), "--no-eval", "--out", "cut"]) == 130
    assert "MB in a file of cut" in capsys.readouterr().out
    assert cli("--resume", "--out", "cut", model=False)[0] == 0
    rows = tofu.load_rows("toy_forget10[:10]") + tofu.load_rows("toy_retain90[:20]")
    positions = sum(e.answer_length for e in data.Tokenizer(tiny).encode_rows(rows))
    assert sizes == 5 * [positions * TINY.hidden_size * 4]
    assert same(weights("cut"), weights("whole")) and records("cut") == records("whole")
    assert {p.name for p in Path("cut").iterdir()} == {p.name for p in Path("whole").iterdir()}


def test_no_space_for_the_states_is_one_line(cli, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reference.IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    status, message = cli(*SMALL, "--out", "a")
    assert status == 2 and message.startswith("error: a/reference.bin: ") and message.count("\n") == 1
    assert "No space left on device" in message and "--reference recompute" in message
    assert not Path("a/reference.bin").exists()
    assert cli(*SMALL, "--reference", "recompute", "--out", "b")[0] == 0


def test_a_copied_run_goes_on_in_its_own_folder(cli, monkeypatch):
    cli(*SMALL, "--out", "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert cli(*SMALL, "--out", "cut")[0] == 130
    shutil.copytree("cut", "copy")
    assert cli("--resume", "--out", "copy", model=False)[0] == 0 and same(weights("copy"), weights("whole"))
    assert not Path("cut/model").exists() and Path("cut/checkpoint").exists()


def test_resume_refuses_what_it_cannot_continue(cli):
    assert "name the run folder" in cli("--resume", model=False)[1]
    assert "no run of this program" in cli("--resume", "--out", "nowhere", model=False)[1]
    cli(*SMALL, "--out", "a")
    assert "was started with lr = 0.001" in cli("--resume", "--out", "a", "--lr", "5", model=False)[1]
    before = weights("a")
    assert cli("--resume", "--out", "a", model=False)[0] == 0 and same(weights("a"), before)


def test_an_existing_folder_is_refused_and_left_alone(cli):
    Path("a").mkdir()
    Path("a/precious").write_text("x")
    status, message = cli(*SMALL, "--out", "a")
    assert status == 2 and "exists already" in message and Path("a/precious").read_text() == "x"
    assert [p.name for p in Path("a").iterdir()] == ["precious"]


def test_a_non_finite_loss_stops_before_the_step_and_keeps_the_last_good_state(cli, monkeypatch):
    cli(*SMALL, "--out", "whole")
    original, calls = dipo.position_terms, itertools.count(1)

    def broken(*arguments):
        terms, *rest = original(*arguments)
        return (terms * float("nan") if next(calls) == 10 else terms, *rest)  # in the third step

    monkeypatch.setattr(dipo, "position_terms", broken)
    status, message = cli(*SMALL, "--out", "cut")
    assert (
        status == 2 and "step 3 of 5: loss is nan; start anew" in message and message.count("\n") <= 1 + message.count("\r")
    )
    assert os.listdir("cut/checkpoint") == ["2"]
    assert cli("--resume", "--out", "cut", model=False)[0] == 0
    assert same(weights("cut"), weights("whole"))


@pytest.fixture
def negative_logits(monkeypatch):
    """The output head of policy and reference subtracts 1000."""
    original = dipo.position_terms

    def shifted(name, role, objective, logits, ref_logits, *more):
        return original(name, role, objective, logits - 1000, ref_logits - 1000, *more)

    monkeypatch.setattr(dipo, "position_terms", shifted)


@pytest.mark.usefixtures("negative_logits")
@pytest.mark.parametrize("preset", ["paper", "anchored"])
def test_negative_logits_are_refused_and_centring_accepts_them(cli, preset):
    status, message = cli(*SMALL, "--preset", preset, "--out", "a")
    assert status == 2 and "roles swap" in message and "--center" in message
    assert cli(*SMALL, "--preset", preset, "--out", "b", "--center")[0] == 0


@pytest.mark.usefixtures("negative_logits")
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_the_logged_share_of_swapped_positions_is_one_where_all_are(cli, monkeypatch, micro):
    monkeypatch.setattr(dipo, "SWAP_LIMIT", 1.0)
    cli(*SMALL, "--micro-batch-size", micro, "--out", "a")
    assert {r["swapped"] for r in records("a")} == {1.0}


def test_the_gradient_is_clipped_only_when_asked(cli):
    cli(*SMALL, "--out", "a")
    cli(*SMALL, "--max-grad-norm", "1e-3", "--out", "b")
    assert records("a")[0] == records("b")[0] and not same(weights("a"), weights("b"))
    cli(*SMALL, "--max-grad-norm", "1e3", "--out", "c")
    assert same(weights("a"), weights("c"))


def test_no_space_for_a_checkpoint_is_one_line(cli, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    status, message = cli(*SMALL, "--out", "a")
    assert status == 2 and "No space left" in message and "--resume" in message and not os.listdir("a/checkpoint")


def test_a_damaged_checkpoint_is_told(cli, monkeypatch):
    monkeypatch.setattr(train, "save_pretrained", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    cli(*SMALL, "--out", "a")
    Path("a/checkpoint/5/weights.safetensors").write_bytes(b"short")
    status, message = cli("--resume", "--out", "a", model=False)
    assert status == 2 and "damaged checkpoint" in message


@pytest.mark.parametrize("losses", LOSSES, ids="+".join)
def test_every_pair_of_losses_trains(cli, tiny, losses):
    arguments = ["--forget-loss", losses[0], "--retain-loss", losses[1], *memory_flags(losses), "--out", "a"]
    assert cli(*SMALL, *arguments)[0] == 0
    keys = records("a")[-1].keys()
    for role, name in zip(dipo.ROLES, losses, strict=True):
        assert (f"loss/{role}" in keys) == (name != "none") and (f"margin/{role}" in keys) == (name in ("dipo", "anchored"))
        assert (f"anchor/{role}" in keys) == (name in ("anchored", "anchored-npo"))
    assert Path("a/memory.json").exists() == (losses[0] in ("anchored", "anchored-npo"))
    assert not same(weights("a"), weights(tiny))


def test_forget_losses_forget_and_finetuning_learns(cli):
    for name in dipo.loss_names("forget"):
        cli(*SMALL, "--forget-loss", name, "--retain-loss", "gd", *memory_flags([name]), "--out", name)
        assert records(name)[-1]["nll/forget"] > records(name)[0]["nll/forget"]
    tuning = "--finetune toy_retain90[:20] --epochs 5 --lr 1e-2 --batch-size 4 --out tuned".split()
    assert cli(*tuning)[0] == 0
    log = records("tuned")
    assert log[-1]["nll/finetune"] < log[0]["nll/finetune"] - 1 and len(log) == 25
    assert cli(*SMALL, "--model", "tuned", "--out", "next", model=False)[0] == 0  # a run is a model


def test_bfloat16_compute_trains_float32_master_weights(cli):
    assert cli(*SMALL, "--dtype", "bfloat16", "--out", "a")[0] == 0
    stored = weights("a")
    assert {p.dtype for p in stored.values() if p.ndim == 2} == {torch.bfloat16}


COMPILED = {"plain": [], "checkpointing": ["--gradient-checkpointing"], "anchored": ["--preset", "anchored", MIXED]}


@pytest.mark.aside
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_run_equals_eager(cli, monkeypatch, kind):
    if kind == "checkpointing":  # all that is computed twice: blocks, and the head piece by piece
        monkeypatch.setattr(train, "chunk_positions", lambda *_: 7)
    arguments = [*SMALL, *COMPILED[kind], "--epochs", "0.8"]
    cli(*arguments, "--no-gradient-checkpointing", "--out", "a")
    assert cli(*arguments, "--out", "b", "--compile")[0] == 0
    for a, b in zip(records("a"), records("b"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# -------------------------------------------------------------------------------------------------- memory positions


ANCHORED = [*SMALL, "--preset", "anchored", MIXED]


def marked_by(model, tiny, tau=-4.0) -> list[data.Example]:
    """The forget examples of SMALL, marked outside of any run."""
    sets = [data.Tokenizer(tiny).encode_rows(tofu.load_rows(n)) for n in ("toy_forget10[:10]", "toy_retain90[:20]")]
    return mark_memory(model, *sets, tau)


def kept(folder) -> dict:
    return json.loads(Path(folder, "memory.json").read_text())


def test_an_anchored_run_trains_on_the_memory_of_its_start_and_keeps_it(cli, tiny, monkeypatch, capsys):
    original, seen = train.compute_gradients, []
    monkeypatch.setattr(train, "compute_gradients", lambda *a: seen.append(a[3]) or original(*a))
    assert train.main([*ANCHORED, "--model", str(tiny), "--no-eval", "--out", "a"]) == 0
    expected = marked_by(load_pretrained(tiny), tiny)
    record = kept("a")
    assert record == json.loads(json.dumps(memory_record(expected, -4.0))) and 0.1 < record["share"] < 0.9
    assert f"memory: {record['share']:.0%} of the forget answers' tokens, a/memory.json" in capsys.readouterr().out
    flags = {e.key: e.memory for e in expected}
    drawn = {role: [e for parts in seen for [e] in parts[role].groups] for role in dipo.ROLES}
    assert len(drawn["forget"]) == 20 and all(e.memory == flags[e.key] for e in drawn["forget"])
    assert all(e.memory is None for e in drawn["retain"])
    files = {"config.json", "log.jsonl", "model", "summary.json", "memory.json"}
    assert {p.name for p in Path("a").iterdir()} == files


def test_memory_positions_depend_on_no_seed_and_no_batch(cli):
    """In files of their own: the toy's rows are its seed's."""
    arguments = [*ANCHORED]
    for role, name in (("forget", "toy_forget10[:10]"), ("retain", "toy_retain90[:20]")):
        lines = [json.dumps({"question": row.question, "answer": row.answer}) for row in tofu.load_rows(name)]
        Path(f"{role}.jsonl").write_text("\n".join(lines))
        arguments += [f"--{role}", f"{role}.jsonl"]
    for name, flags in {"a": [], "b": ["--seed", 1], "c": ["--micro-batch-size", 4, "--batch-size", 5]}.items():
        assert cli(*arguments, *flags, "--out", name)[0] == 0
    assert kept("a") == kept("b") == kept("c") and len(kept("a")["rows"]) == 10 and records("a") != records("b")
    assert cli(*arguments, "--tau", "-2", "--out", "d")[0] == 0
    assert kept("d")["tau"] == -2 and kept("d")["share"] < kept("a")["share"]
    assert all({*positions} <= {*kept("a")["rows"][key]} for key, positions in kept("d")["rows"].items())


@claim("an interrupted anchored run goes on to the same bits: memory is told by the start of the run, not by the checkpoint")
def test_an_interrupted_anchored_run_resumes_exactly(cli, tiny, monkeypatch):
    arguments = [*ANCHORED, "--lr", "1e-2"]
    cli(*arguments, "--out", "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert cli(*arguments, "--out", "cut")[0] == 130
    halfway = load_pretrained(tiny)
    assert train.load_checkpoint(Path("cut"), halfway, train.make_optimizer(halfway, train.Config())) == 3
    assert memory_record(marked_by(halfway, tiny), -4.0)["rows"] != kept("whole")["rows"]  # it would tell them otherwise
    Path("cut/memory.json").unlink()
    assert cli("--resume", "--out", "cut", model=False)[0] == 0
    assert same(weights("cut"), weights("whole")) and records("cut") == records("whole") and kept("cut") == kept("whole")


def test_every_position_is_forgotten_on_request_and_then_no_retain_set_is_needed(cli):
    everything = [*SMALL, "--forget-loss", "anchored", "--positions", "all"]
    assert cli(*everything, "--retain-loss", "none", "--out", "a")[0] == 0
    assert not Path("a/memory.json").exists() and records("a")[-1]["anchor/forget"] > 0
    assert cli(*everything, "--retain-loss", "anchored", "--out", "b")[0] == 0
    assert cli(*ANCHORED, "--tau", "-100", "--out", "c")[0] == 0
    assert records("b") == records("c") and kept("c")["share"] == 1 and not Path("b/memory.json").exists()


def test_kappa_holds_the_policy_at_its_target(cli):
    """At the start the retain anchor is zero, the policy being the reference."""
    for kappa in ("0.0", "1.0"):
        assert cli(*ANCHORED, "--kappa", kappa, "--out", kappa)[0] == 0
    first, free, held = records("0.0")[0], records("0.0")[-1], records("1.0")[-1]
    assert first["anchor/retain"] < 1e-6 < first["anchor/forget"]
    assert held["anchor/forget"] < free["anchor/forget"] and held["anchor/retain"] < free["anchor/retain"]
    assert free["loss"] < 2 * math.log(2) < records("1.0")[0]["loss"]


# ------------------------------------------------------------------------------------------------------- evaluation


EVAL = ["--eval-retain", "toy_retain_perturbed[:3]", "--max-new-tokens", "3"]


@pytest.fixture
def short_options(monkeypatch):
    """Evaluate on three real-authors and world-facts rows."""
    original = tofu.evaluation_sets

    def short(*arguments):
        return {k: v + "[:3]" if k in ("ra", "wf") else v for k, v in original(*arguments).items()}

    monkeypatch.setattr(tofu, "evaluation_sets", short)


def test_evaluation_trajectory_and_summary(cli, tiny, short_options, capsys):
    status, _ = cli(*SMALL, *EVAL, "--eval-every", "1", "--retain-model", tiny, "--out", "a", evaluate=True)
    assert status == 0
    summary = json.loads(Path("a/summary.json").read_text())
    for name in ("target", "unlearned", "retrained"):
        assert summary[name]["parts"].keys() == set(metrics.UTILITY_PARTS)
        assert 0 <= summary[name]["forget_quality"] <= 1 and 0 <= summary[name]["model_utility"] <= 1
    assert summary["retrained"]["forget_quality"] == summary["target"]["forget_quality"] == 1.0
    recorded = json.loads(Path("a/config.json").read_text())["data"]
    assert recorded["retain"]["rows"] == 20 and recorded["evaluation"]["retain"]["rows"] != 20  # trained on, evaluated on
    trajectory = [json.loads(line) for line in Path("a/trajectory.jsonl").read_text().splitlines()]
    assert [(r["step"], r["epoch"]) for r in trajectory] == [(2, 1.0), (5, 2.0)]
    assert trajectory[-1]["model_utility"] == summary["unlearned"]["model_utility"]
    # The stored model evaluates to what the model in memory did, with a fresh folder and so without its kept results.
    fresh = Path("a/model").rename("fresh")
    arguments = [
        "--model",
        str(fresh),
        "--forget",
        "toy_forget10[:10]",
        *EVAL,
        "--retain-model",
        str(tiny),
        "--out",
        "e.json",
    ]
    assert evaluate(arguments) == 0
    assert json.loads(Path("e.json").read_text())["model"] == summary["unlearned"]


def test_only_the_first_rows_of_each_set_are_evaluated(cli, tiny):
    more = ["--eval-rows", "2", "--max-new-tokens", "3", "--retain-model", tiny]
    assert cli(*SMALL, *more, "--out", "a", evaluate=True)[0] == 0
    logs = [*Path("a/eval").glob("*/log.json")]
    assert len(logs) == 2  # target and retrained model are one here, and asked once
    for log in logs:
        assert {len(items) for items in json.loads(log.read_text())["rows"].values()} == {2}
    recorded = json.loads(Path("a/config.json").read_text())["data"]
    assert {sets["rows"] for sets in recorded["evaluation"].values()} == {2} and recorded["forget"]["rows"] == 10


def test_the_last_epoch_is_in_the_trajectory_and_the_plot_is_drawn(cli, tiny, short_options):
    pytest.importorskip("matplotlib")
    more = [*EVAL, "--eval-every", "1.5", "--retain-model", tiny]
    assert cli(*SMALL, *more, "--out", "a", evaluate=True)[0] == 0
    assert [json.loads(line)["epoch"] for line in Path("a/trajectory.jsonl").read_text().splitlines()] == [1.5, 2.0]
    assert Path("a/trajectory.png").exists()
    for name in ("log.json", "TOFU_EVAL.json", "TOFU_SUMMARY.json"):
        assert len(list(Path("a/eval").glob(f"*/{name}"))) >= 2


def test_a_reference_with_other_rows_is_refused_before_the_training(cli, short_options):
    Path("log.json").write_text(json.dumps({"rows": {"forget": {str(i): {"truth_ratio": 0.5} for i in range(7)}}}))
    status, message = cli(*SMALL, *EVAL, "--retain-logs", "log.json", "--out", "a", evaluate=True)
    assert status == 2 and "holds 7 forget rows, this evaluation 10" in message and not Path("a/log.jsonl").exists()


@pytest.mark.usefixtures("cli", "short_options")
def test_without_a_retain_reference_forget_quality_is_absent_and_the_reason_told(tiny, capsys):
    assert train.main([*SMALL, *EVAL, "--model", str(tiny), "--out", "a"]) == 0
    assert json.loads(Path("a/summary.json").read_text())["unlearned"]["forget_quality"] is None
    assert "--retain-logs FILE" in capsys.readouterr().out


@pytest.fixture
def muse(tmp_path) -> Path:
    """A small MUSE-News in the layout that the MUSE code writes."""
    texts = [f"Report {i}. The mayor of town {i} opened bridge {i * 7} and said it was number {i}." for i in range(12)]
    qa = [{"question": f"Which bridge did mayor {i} open?", "answer": f"bridge {i * 7}"} for i in range(4)]
    verbatim = [{"prompt": text[:40].rsplit(" ", 1)[0], "gt": text[40:]} for text in texts[:4]]
    files = {"raw/forget": texts[:6], "raw/retain1": texts[6:], "verbmem/forget": verbatim, "privleak/forget": texts[:4],
             "privleak/holdout": texts[8:], "knowmem/forget_qa": qa, "knowmem/retain_qa": qa[::-1],
             "knowmem/forget_qa_icl": qa[:2], "knowmem/retain_qa_icl": qa[:2], "scal/forget_2": texts[:8]}  # fmt: skip
    files |= {f"sust/forget_{k}": texts[k : k + 2] for k in range(1, 5)}
    for name, rows in files.items():
        path = tmp_path / "MUSE" / "MUSE-News" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    return tmp_path / "MUSE"


MUSE = "--forget muse_news --max-length 32 --epochs 2 --batch-size 4 --lr 1e-3 --eval-rows 2".split()
MUSE_NUMBERS = {"forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "mia_min_k", "privleak",
                "exact_memorization", "extraction_strength"}  # fmt: skip


@pytest.mark.parametrize("chunking", ["open-unlearning", "muse"])
def test_muse_end_to_end(cli, muse, chunking, capsys):
    more = ["--data-dir", muse, "--retain-logs", "muse", "--chunking", chunking, "--eval-every", "1", "--out", "a"]
    status, error = cli(*MUSE, *more, evaluate=True)
    assert status == 0, error
    config = json.loads(Path("a/config.json").read_text())["config"]
    assert (config["preset"], config["schedule"], config["weight_decay"], config["warmup_epochs"]) == (
        "muse",
        "constant",
        0,
        0,
    )
    summary = json.loads(Path("a/summary.json").read_text())
    for name in ("target", "unlearned"):
        assert summary[name].keys() == MUSE_NUMBERS and summary[name]["privleak"] is not None
    assert len({record["lr"] for record in records("a")}) == 1
    assert len(Path("a/trajectory.jsonl").read_text().splitlines()) == 2
    [folder] = Path("a/eval").glob("final-*")
    assert {path.name for path in folder.iterdir()} == {"log.json", "MUSE_EVAL.json", "MUSE_SUMMARY.json", "MUSE.csv"}
    found = json.loads((folder / "MUSE_EVAL.json").read_text())
    assert found["privleak"]["agg_value"] == summary["unlearned"]["privleak"]
    argv = ["--model", "a", "--forget", "muse_news[:2]", "--data-dir", str(muse), "--retain-logs", str(folder / "log.json")]
    assert evaluate([*argv, "--show", "1"]) == 0  # evaluated by the run: read
    out = capsys.readouterr().out
    assert "PrivLeak against" in out and out.count("ROUGE-L F1") == 3


def test_muse_in_sequence_and_growing(cli, muse):
    """Each request starts from the model of the one before it; an interrupted sequence goes on."""
    more = ["--data-dir", muse, "--epochs", "1"]
    assert cli(*MUSE, *more, "--sust", "--out", "a", evaluate=True)[0] == 0
    after = json.loads(Path("a/summary.json").read_text())
    assert list(after) == [f"request {k}" for k in range(1, 5)] and after["request 4"].keys() == MUSE_NUMBERS
    for k in range(1, 5):
        config = json.loads(Path(f"a/request-{k}/config.json").read_text())["config"]
        assert config["forget"] == f"muse_news/sust/forget_{k}"
        assert k == 1 or config["model"] == str(Path(f"a/request-{k - 1}").absolute())
    last = weights("a/request-4")
    assert not same(last, weights("a/request-3"))
    shutil.rmtree("a/request-4")
    Path("a/summary.json").unlink()
    assert cli("--resume", "--out", "a", model=False, evaluate=True)[0] == 0
    assert same(weights("a/request-4"), last) and Path("a/summary.json").exists()
    assert cli(*MUSE, *more, "--scal", "2", "--out", "b")[0] == 0
    assert json.loads(Path("b/config.json").read_text())["data"]["forget"]["rows"] == 8


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--forget", "muse_daily"], "'daily' is unknown"),
        (["--forget", "muse_news/knowmem/forget_qa"], "muse_news/knowmem/forget_qa"),
        (["--forget", "muse_news[99:]"], "[99:]"),
        (["--forget", "muse_books", "--scal", "1"], "--scal"),
        (["--forget", "muse_news", "--scal", "5"], "--scal 5"),
        (["--forget", "muse_news", "--scal", "1", "--sust"], "--sust"),
        (["--forget", "muse_news", "--retain", "muse_news/raw/retain3"], "retain3"),
    ],
)
def test_muse_refuses_what_it_does_not_know_in_one_line(cli, muse, arguments, told):
    status, error = cli(*arguments, "--data-dir", muse, "--out", "a")
    assert status == 2 and told in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path("a").exists()


def test_the_toy_world_end_to_end_and_its_cache(tmp_path, monkeypatch, short_options, capsys):
    """`python train.py` with everything shortened; the full run is what .ci/run does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TOY_FINETUNE", train.TOY_FINETUNE | {"epochs": 0.05, "warmup_epochs": 0.0})
    arguments = ["--epochs", "1", "--forget", "toy_forget10[:8]", *EVAL]
    assert train.main(arguments) == 0
    first = capsys.readouterr().out
    assert "target" in first and "retrained" in first and "forget_quality" in first
    assert len(re.findall(r"^ +reference ", first, re.M)) == 3
    assert train.main(arguments) == 0
    second = capsys.readouterr().out
    assert "training on" in first and "training on" not in second
    runs = sorted(p.name for p in Path("runs").iterdir() if p.name.startswith("toy_"))
    assert runs == ["toy_forget10__8_-anchored-anchored-001", "toy_forget10__8_-anchored-anchored-002"]
    assert "memory: " in first and len(kept(Path("runs") / runs[0])["rows"]) == 8
    one, two = (json.loads((Path("runs") / r / "summary.json").read_text()) for r in runs)
    assert one.pop("model") != two.pop("model") and one == two


# ------------------------------------------------------------------------------------------------------------- hints


def log_of(forget, retain):
    return [
        {"epoch": i + 1.0, "nll/forget": f, "nll/retain": r} for i, (f, r) in enumerate(zip(forget, retain, strict=True))
    ]


def scores_of(*pairs):
    return [{"epoch": i, "forget_quality": quality, "model_utility": utility} for i, (quality, utility) in enumerate(pairs)]


GOOD = log_of([0.1, 2.0, 4.0], [0.1, 0.2, 0.2])
HINTS = {
    "nothing": ((GOOD, scores_of((1e-9, 0.8), (0.4, 0.79)), False, 0.2), []),
    "utility": ((GOOD, scores_of((1e-9, 0.8), (0.4, 0.39)), False, 0.2), ["utility collapsed: model utility 0.39"]),
    "utility without evaluation": ((log_of([0.1, 3.0], [0.1, 1.2]), [], None, None), ["utility collapsed: retain answers"]),
    "too little": ((GOOD, scores_of((1e-9, 0.8), (0.049, 0.8)), True, 0.0), ["under-unlearning: forget quality 0.049"]),
    "too little without evaluation": ((log_of([0.1, 0.5], [0.1, 0.1]), [], None, None), ["under-unlearning: the forget"]),
    "too little, no reference": ((log_of([0.1, 0.5], [0.1, 0.1]), scores_of((None, 0.8), (None, 0.8)), None, 0.0),
                                 ["under-unlearning: the forget"]),
    "too much": ((GOOD, scores_of((1e-9, 0.8), (1e-4, 0.8)), False, 0.0), ["over-unlearning: forget quality 0.0001, "]),
    "too much after a peak": ((GOOD, scores_of((1e-9, 0.8), (0.3, 0.8), (1e-4, 0.8)), False, 0.0),
                              ["(it was 0.3 at epoch 1); train fewer"]),
    "too much, whatever the truth ratios": ((GOOD, scores_of((1e-9, 0.8), (0.3, 0.8), (1e-4, 0.8)), True, 0.0), ["over-"]),
    "back and forth": ((GOOD, scores_of(*[(0.4, u) for u in (0.8, 0.6, 0.8, 0.6, 0.8)]), False, 0.0), ["oscillation: "]),
    "no language": ((GOOD, scores_of((1e-9, 0.8), (0.4, 0.79)), False, 0.51), ["degenerate text: 51% "]),
    "a broken model": ((GOOD, scores_of((1e-9, 0.8), (1e-4, 0.1)), True, 0.0), ["utility collapsed"]),
    "two of them": ((GOOD, scores_of((1e-9, 0.8), (1e-4, 0.1)), False, 0.9), ["utility", "over-", "degenerate"]),
}  # fmt: skip


@pytest.mark.parametrize("given, expected", HINTS.values(), ids=HINTS)
def test_each_failure_is_told_with_its_remedy(given, expected):
    found = hints.hints(*given)
    assert len(found) == len(expected) and all(part in line for part, line in zip(expected, found, strict=True))
    assert all("--lr" in line and "\n" not in line for line in found)


def test_a_run_that_fails_prints_its_hints(cli, tiny, short_options, capsys):
    arguments = [*SMALL, *EVAL, "--out", "a", "--epochs", "1", "--eval-every", "1"]
    assert train.main([*map(str, arguments), "--model", str(tiny), "--lr", "1e-9"]) == 0
    out = capsys.readouterr().out
    kept = json.loads(Path("a/summary.json").read_text())["hints"]
    assert kept and [line.removeprefix("hint: ") for line in out.splitlines() if line.startswith("hint: ")] == kept


# ---------------------------------------------------------------------------------------------- command line, bad input


BAD = {
    "unknown alias": (["--model", "llama9"], "neither an alias"),
    "unknown set": (["--forget", "tofu_forget07"], "is unknown"),
    "malformed slice": (["--forget", "toy_forget10[3]"], "is not of the form"),
    "empty slice": (["--forget", "toy_forget10[70:]"], "is empty"),
    "unknown complement": (["--forget", "toy_full", "--no-eval"], "--retain"),
    "missing data folder": (["--forget", "tofu_forget01", "--data-dir", "nowhere"], "no such folder"),
    "missing file": (["--forget", "mine.jsonl", "--retain", "mine.jsonl"], "mine.jsonl"),
    "not positive": (["--lr", "0"], "must be positive"),
    "p above one": (["--p", "1.5"], "at most 1"),
    "refusals of texts": (["--forget", "muse_news", "--forget-loss", "dpo"], "use npo"),
    "missing refusals": (["--forget-loss", "dpo", "--refusals", "none.txt"], "none.txt"),
    "toy vocabulary": (["--toy-vocabulary", "100"], "at least 400"),
    "unknown preset": (["--preset", "best"], "unknown"),
    "unknown loss": (["--forget-loss", "wag"], "forget loss 'wag' is none of dipo, anchored, npo, anchored-npo"),
    "loss of the other set": (["--retain-loss", "ga"], "retain loss 'ga' is none of dipo, anchored, gd, kl"),
    "kappa of no anchor": (["--kappa", "0.1"], "--kappa: is of anchored losses, not of dipo; drop the flag"),
    "tau of no anchor": (["--tau", "1", "--forget-loss", "npo"], "--tau: is of anchored losses, not of npo"),
    "positions of no anchor": (["--positions", "all"], "--positions: is of anchored losses"),
    "kappa of finetuning": (
        ["--finetune", "toy_full", "--kappa", "0.1"],
        "--kappa: is of anchored losses, not of finetuning",
    ),
    "tau of the retain loss": (["--retain-loss", "anchored", "--tau", "1"], "--tau: is of anchored losses, not of dipo"),
    "infinite kappa": (["--preset", "anchored", "--kappa", "inf"], "--kappa inf: must be 0 or more, and finite"),
    "memory without a retain set": (["--preset", "anchored", "--retain-loss", "none"], "name a retain loss"),
    "memory of NPO without one": (["--forget-loss", "anchored-npo", "--retain-loss", "none"], "name a retain loss"),
    "tau no number": (["--preset", "anchored", "--tau", "nan"], "--tau nan: must be a number of nats"),
    "tau without end": (["--preset", "anchored", "--tau=-inf"], "--tau -inf: must be a number of nats; --positions all"),
    "tau beyond the floor": (["--preset", "anchored", "--tau", "4"], "--tau 4.0: no token surprises by 3.91 nats or more"),
    "tau of all positions": (
        ["--preset", "anchored", "--tau", "1", "--positions", "all"],
        "--tau: tells memory positions apart",
    ),
    "negative kappa": (["--preset", "anchored", "--kappa=-1"], "--kappa -1.0: must be 0 or more"),
    "beta of none": (["--forget-loss", "ga", "--beta", "1"], "ga has none"),
    "unknown device": (["--device", "warp"], "--device warp"),
    "broken retain log": (["--retain-logs", "nothing.json"], "nothing.json"),
    "two references": (["--retain-logs", "a", "--retain-model", "b"], "one of them"),
    "folder without a model": (["--model", "."], "config.json"),
}


@pytest.mark.parametrize("arguments, expected", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_leaves_no_run(cli, tiny, arguments, expected):
    has_model = "--model" in arguments
    status, message = cli(*([] if has_model else ["--model", tiny]), *arguments, "--out", "a", evaluate=True, model=False)
    assert status == 2 and message.startswith("error: ") and message.count("\n") == 1 and expected in message
    assert not Path("a").exists()


def test_the_toy_model_knows_toy_sets_only(cli):
    status, message = cli("--forget", "tofu_forget10", model=False)
    assert status == 2 and "never seen" in message
    assert "--model" in cli("--finetune", "toy_full", model=False)[1]


def test_missing_eval_libraries_are_told_before_any_work(cli, monkeypatch):
    monkeypatch.setattr(metrics, "ks_2samp", None)
    status, message = cli(*SMALL, "--out", "a", evaluate=True)
    assert status == 2 and "pip install -e '.[eval]'" in message and not Path("a").exists()


def test_rows_longer_than_the_model_are_refused(cli, tmp_path):
    Path("long.jsonl").write_text(json.dumps({"question": "Why?", "answer": "because " * 200}) + "\n")
    status, message = cli("--forget", "long.jsonl", "--retain", "long.jsonl", "--out", "a")
    assert status == 2 and "512" in message


def test_help_tells_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines at hyphens
    for field in dataclasses.fields(train.Config):
        assert "--" + field.name.replace("_", "-") in text
        if field.default is not None:
            assert f"default {field.default}" in text


def test_the_papers_hyper_parameters_are_the_defaults():
    config = train.make_config({"model": "llama2-7b", "forget": "tofu_forget10"})
    assert config.objective == dipo.Objective()
    assert (config.objective.beta_of("dipo"), config.p, config.lam) == (0.05, 0.05, 1.0)
    assert (config.lr, config.epochs, config.batch_size, config.weight_decay, config.warmup_epochs) == (
        1e-5,
        10,
        32,
        0.01,
        1,
    )


def test_the_toy_is_anchored_and_a_preset_over_a_data_set_says_which_losses():
    """`--preset paper` on the toy is the run that this repository had first: the toy's settings, the paper's losses. Only
    where no loss is named has the toy the preset anchored, and a rate of its own there."""
    papers, toys = train.make_config({"preset": "paper"}), train.make_config({})
    both = {"forget_loss": "anchored", "retain_loss": "anchored"}
    assert papers.objective == dipo.Objective()
    assert toys == dataclasses.replace(papers, preset="anchored", lr=8e-4, **both)
    named = train.make_config({"forget_loss": "npo"})
    assert named == dataclasses.replace(papers, preset="toy", forget_loss="npo")
    assert (papers.lr, papers.epochs, papers.batch_size, papers.warmup_epochs) == (4e-4, 10, 16, 1)
    assert (papers.weight_decay, papers.schedule, papers.eval_every, papers.max_new_tokens) == (0.01, "linear", 2, 24)
    for real in ({"model": "llama2-7b", "forget": "tofu_forget10"}, {"model": "muse-news", "forget": "muse_news"}):
        plain, anchored = (train.make_config(real | more) for more in ({}, {"preset": "anchored"}))
        assert anchored == dataclasses.replace(plain, preset="anchored", **both)
        assert plain.objective == dipo.Objective() and anchored.lr == 1e-5
        assert anchored.schedule == {"tofu_forget10": "linear", "muse_news": "constant"}[real["forget"]]
    typed = train.make_config({"preset": "anchored", "forget_loss": "npo", "lr": 0.1})
    assert (typed.forget_loss, typed.retain_loss, typed.lr, typed.batch_size) == ("npo", "anchored", 0.1, 16)
    finetuning = train.make_config({"model": "x", "finetune": "toy_full"})
    assert (finetuning.preset, finetuning.lr) == ("paper", 1e-5)


def test_docs_running_documents_exactly_the_logged_keys(cli):
    cli(*SMALL, "--out", "a")
    cli("--finetune", "toy_full[:4]", "--epochs", "1", "--out", "b")
    cli(*ANCHORED, "--out", "c")
    logged = {key for run in "abc" for key in json.loads(Path(run, "log.jsonl").read_text().splitlines()[0])}
    page = (Path(train.__file__).parent / "docs/running.md").read_text().split("Keys of `log.jsonl`")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", page, re.M)) == logged
