"""Memory of one training step at a real vocabulary: logits at the answer's positions against logits everywhere."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import re, torch
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
torch.set_num_threads(1)
config = Qwen3Config(vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
model = Qwen3ForCausalLM(config)
model.requires_grad_(False)
model.model.layers[0].requires_grad_(True)
ids = torch.randint(0, 151936, (1, 1500))
labels = torch.full_like(ids, -100)
labels[0, -3:] = ids[0, -3:]
def step(kind):
    # Begins the peak anew: a child process inherits its parent's, which in a long test run is large.
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    if kind == "full":
        loss = model(input_ids=ids, labels=labels).loss
    else:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        logits = model.lm_head(hidden[rows, columns]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][rows, columns])
    loss.backward()
    print(loss.item(), (peak() - before) / 2**20)

step("labels")
step("full")
"""


def test_label_only_logits_save_gigabytes() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    same_loss, label_gib, loss, full_gib = map(float, run.stdout.split())
    assert abs(loss - same_loss) < 1e-5
    logits_gib = 1500 * 151936 * 4 / 2**30
    print(f"peak memory of a step: {full_gib:.2f} GiB with all logits, {label_gib:.2f} GiB with the labels' only")
    assert full_gib > 2 * logits_gib and label_gib < 0.3 * logits_gib
