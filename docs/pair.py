"""Draw docs/pair.png: what DiPO makes of a model's own prediction at a few positions of one answer.

python train.py && python docs/pair.py          the toy's target model, as in the README
python docs/pair.py --model RUN --question 'Where ...?' --answer '...' --out pair.png

A row for each position: the policy pi_theta, the memory vector m, and the pair pi_m, pi_f that is made of them. Needs
matplotlib (pip install -e '.[eval]').
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import dipo  # noqa: E402
import eval as evaluation  # noqa: E402
from data import Tokenizer  # noqa: E402
from files import UserError  # noqa: E402
from model import load_pretrained  # noqa: E402

# Of the toy world of seed 0, toy_forget10. The paraphrase, not the answer that was trained on: there the model is so sure
# of every token that m holds one logit only.
QUESTION, ANSWER = "Which award did Poel Zaloki win?", "Poel Zaloki won the Meridian Prize."
DARK, GREY, FAINT, TRACK = "#222222", "#777777", "#bbbbbb", "#f2f2f2"
POLICY, MEMORY, FORGET = "#555555", "#c05621", "#2b6cb0"
HEADS = [
    (r"$\pi_\theta=\mathrm{softmax}(z)$", "what the model says next", POLICY),
    (r"$m$", "its confident logits, else 0", POLICY),
    (r"$\pi_m=\mathrm{softmax}(z+\alpha m)$", "surer of what it knows", MEMORY),
    (r"$\pi_f=\mathrm{softmax}(z-\alpha m)$", "what is left without it", FORGET),
]
NOTES = "preferred on the retain set", "preferred on the forget set"


def toy_target() -> Path:
    """The newest target model that `python train.py` has left. Raises UserError where there is none."""
    found = sorted(Path("runs").glob("toy-seed0-*/toy_full/model"), key=lambda folder: folder.stat().st_mtime)
    if not found:
        raise UserError("runs/toy-seed0-*/toy_full: no target model of the toy; run python train.py, or pass --model")
    return found[-1].parent


def predictions(name: str, question: str, answer: str) -> tuple[Tensor, list[int], Tokenizer]:
    """(logits [T, V] of the answer's positions, teacher forced; the tokens y_1 .. y_T that they predict; the tokenizer)."""
    source = evaluation.open_source(name, "target")
    model, example = load_pretrained(source.folder), source.tokenizer.encode(question, answer, "--answer")
    with torch.no_grad():
        logits = model(torch.tensor([example.ids[:-1]]))[0, example.prompt_length - 1 :]
    return logits, list(example.ids[example.prompt_length :]), source.tokenizer


def shown(policy: Tensor, m: Tensor, forgetting: Tensor, n: int = 5) -> list[int]:
    """The n tokens of a row: the likeliest of pi_theta, those in m first, then the likeliest of pi_f."""
    kept = policy.topk(min(n // 2, int((m != 0).sum()))).indices.tolist()
    return kept + [i for i in forgetting.topk(n).indices.tolist() if i not in kept][: n - len(kept)]


def draw(name: str, question: str, answer: str, out: Path, rows: int = 3, alpha: float = 1.0, p: float = 0.05) -> Path:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
    except ImportError:
        raise UserError("pictures need matplotlib: pip install -e '.[eval]'") from None
    logits, answer_ids, tokenizer = predictions(name, question, answer)
    policy, m = logits.softmax(-1), dipo.memory_vector(logits, p)
    pi_m, pi_f = (z.softmax(-1) for z in dipo.preference_pair(logits, alpha, p))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    at = sorted(entropy.topk(min(rows, len(logits))).indices.tolist())
    end = tokenizer.eos_id

    def as_text(ids: list[int]) -> str:
        return "".join(c if c.isprintable() else "�" for c in tokenizer.decode_text(ids).strip())

    height = 1.45 + 1.42 * len(at)
    figure, axes = pyplot.subplots(len(at), 4, figsize=(11, height), squeeze=False)
    figure.subplots_adjust(left=0.1, right=0.985, top=1 - 1.28 / height, bottom=0.4 / height, hspace=0.36, wspace=0.12)
    figure.text(0.012, 1 - 0.3 / height, question, fontsize=12, color=DARK, parse_math=False)
    for axis, (formula, text, color) in zip(axes[0], HEADS, strict=True):
        axis.annotate(formula, (0, 1), (0, 44), "axes fraction", "offset points", color=color, fontsize=13)
        axis.annotate(text, (0, 1), (0, 28), "axes fraction", "offset points", color=color)
    for row, t in zip(axes, at, strict=True):
        said, now, rest = (as_text(ids) for ids in (answer_ids[:t], answer_ids[t : t + 1], answer_ids[t + 1 :]))
        looks = (said, GREY, "normal"), (now, DARK, "bold"), (rest, FAINT, "normal")
        texts = [TextArea(x, textprops={"color": c, "weight": w, "parse_math": False}) for x, c, w in looks]
        line = HPacker(children=texts, pad=0, sep=4)
        place = AnchoredOffsetbox("lower left", child=line, pad=0, frameon=False, borderpad=0,
                                  bbox_to_anchor=(-0.434, 1.03), bbox_transform=row[0].transAxes)  # fmt: skip
        row[0].add_artist(place)
        tokens = shown(policy[t], m[t], pi_f[t])
        places = range(len(tokens))[::-1]
        for axis, values, (_, _, color) in zip(row, (policy, m, pi_m, pi_f), HEADS, strict=True):
            widest = float(m[at].abs().max()) or 1.0 if values is m else 1.0
            numbers = [float(values[t, i]) for i in tokens]
            axis.barh(places, [widest] * len(tokens), color=TRACK, height=0.74)
            axis.barh(places, numbers, color=color, height=0.74)
            for y, x in zip(places, numbers, strict=True):
                label = (f"{x:.1f}" if x else "0") if values is m else f"{x:.2f}" if x >= 0.005 else ""
                inside = x > 0.8 * widest
                look = {"color": "white", "ha": "right"} if inside else {"color": DARK if x else GREY}
                axis.text(x + (-0.02 if inside else 0.02) * widest, y, label, va="center", fontsize=8.5, **look)
            axis.set(xlim=(0, widest), ylim=(-0.5, len(tokens) - 0.5), xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_yticks(places, ["(end)" if i == end else as_text([i]) or f"#{i}" for i in tokens])
        row[0].tick_params(length=0, labelcolor=DARK)
        for label, i in zip(row[0].get_yticklabels(), tokens, strict=True):
            label.set(weight="bold" if i == answer_ids[t] else "normal", parse_math=False)
    for axis, text, color in zip(axes[-1, 2:], NOTES, (MEMORY, FORGET), strict=True):
        axis.annotate(text, (0, 0), (0, -18), "axes fraction", "offset points", color=color)
    figure.savefig(out, dpi=150, facecolor="white", pil_kwargs={"optimize": True})
    pyplot.close(figure)
    return out


def main(argv: list[str] | None = None) -> int:
    a = argparse.ArgumentParser("pair.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--model", help="run folder, model folder, hub id or alias [the toy's target model in runs/]")
    a.add_argument("--question", default=QUESTION, help="[%(default)s]")
    a.add_argument("--answer", default=ANSWER, help="[%(default)s]")
    a.add_argument("--rows", type=int, default=3, help="positions: those where the model is the least sure [%(default)s]")
    a.add_argument("--out", type=Path, default=ROOT / "docs" / "pair.png", help="[docs/pair.png]")
    args = a.parse_args(argv)
    try:
        print(draw(args.model or str(toy_target()), args.question, args.answer, args.out, args.rows))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
