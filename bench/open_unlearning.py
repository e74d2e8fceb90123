"""open-unlearning's side of peer.py, in a process of its own: its modules are called as some of ours are.

Reads one line for each thing to do, 'evaluate' or 'step', and answers with its time and what came of it, a line of JSON.
Its code runs as it is, from its own configuration. Changed are: where the rows are from, the template (our prompt), the
padding token, so that no EOS in a prompt is hidden, and the optimizer, since its own is for GPUs.
"""

import contextlib
import json
import logging
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import transformers

SETTINGS = json.loads(sys.argv[1])  # root, model, template, data, rows, forget, retain
CONFIGS, SOURCE = (str(Path(SETTINGS["root"], name).resolve()) for name in ("configs", "src"))
sys.path[0] = SOURCE
# Two modules that its packages import and that are not used here would need lm_eval and deepspeed.
for module, name in (("evals.lm_eval", "LMEvalEvaluator"), ("trainer.unlearn.rmu", "RMU")):
    sys.modules[module] = types.SimpleNamespace(**{name: type(name, (), {})})


def evaluation(model, tokenizer):
    """A function that evaluates once, with the default metrics but privleak, whose holdout rows may not be at hand."""
    import datasets
    from evals.tofu import TOFUEvaluator
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    datasets.disable_progress_bars()
    with initialize_config_dir(CONFIGS, version_base=None):
        config = compose("eval.yaml", overrides=["experiment=eval/tofu/default", "task_name=bench", "paths.output_dir=."])
    settings = OmegaConf.to_container(config.eval.tofu, resolve=True)
    del settings["metrics"]["privleak"]

    def from_files(node) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            if key == "hf_args":
                file = str(Path(SETTINGS["data"], "TOFU", f"{value['name']}.json"))
                node[key] = {"path": "json", "data_files": file, "split": f"train[:{SETTINGS['rows']}]"}
            from_files(value)

    from_files(settings)

    def evaluate():
        with tempfile.TemporaryDirectory() as folder:
            evaluator = TOFUEvaluator(OmegaConf.create(settings | {"output_dir": folder}))
            evaluator.evaluate(model=model, tokenizer=tokenizer, template_args=SETTINGS["template"])
            return json.loads(Path(folder, "TOFU_EVAL.json").read_text())

    return evaluate


def training(model, tokenizer):
    """A function that makes one step of NPO with its default settings on all of the forget and retain rows."""
    from data.collators import DataCollatorForSupervisedDataset
    from data.qa import QADataset
    from trainer.unlearn.npo import NPO

    arguments = transformers.TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to=[], learning_rate=1e-4)
    trainer = NPO(model=model, args=arguments, beta=0.1, alpha=1.0, gamma=1.0, retain_loss_type="NLL")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    collate, inputs = DataCollatorForSupervisedDataset(tokenizer), {}
    for role in ("forget", "retain"):
        file = {"path": "json", "data_files": SETTINGS[role], "split": "train"}
        rows = QADataset(file, SETTINGS["template"], tokenizer)
        inputs[role] = collate([{k: v for k, v in rows[i].items() if k != "index"} for i in range(len(rows))])

    def step():
        model.train()
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    answers = sys.stdout
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    made = {}
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            name = line.strip()
            if name not in made:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    SETTINGS["model"], dtype=torch.float32, attn_implementation="sdpa"
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(SETTINGS["model"])
                tokenizer.pad_token = tokenizer.unk_token
                made[name] = {"evaluate": evaluation, "step": training}[name](model, tokenizer)
            began = time.perf_counter()
            found = made[name]()
            print(json.dumps({"seconds": time.perf_counter() - began, "found": found}), file=answers, flush=True)


if __name__ == "__main__":
    main()
