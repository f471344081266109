"""docs/migrating.md: both scripts print the same losses and norms, and every block of the page runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import migrating_work as work
from model_work import CASES
from pool import Pool

pytestmark = [
    pytest.mark.cpu_ranks,  # what they print is compared with one process on the CPU
    # The search for a learning rate means slices, of which a state dict may warn.
    pytest.mark.filterwarnings("ignore:state_dict. it holds this rank's 1-D slices"),
]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
(DIFF,) = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

CAME_OVER = """
theirs = torch.load("fsdp2.pt")["model"]
with mics.full_params(model):
    assert theirs.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())
"""
WENT_BACK = """
for name, value in model.state_dict().items():
    assert torch.equal(value, before["model"][name])
assert not any(state["step"] for state in optimizer.state_dict()["state"].values())
"""
CHECKS = {"fsdp2.pt": CAME_OVER, "before[": WENT_BACK}
"""What must hold behind the block that has such words."""


def script(sign: str) -> str:
    """The script before (-) or after (+)."""
    return "".join(f"{line[1:]}\n" for line in DIFF.splitlines() if line[:1] in (" ", sign))


def told(text: str, what: str = "loss") -> list[float]:
    return [float(number) for number in re.findall(rf"{what} ([0-9.]+)", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("migrating")


@pytest.fixture(scope="module")
def said(pool: Pool, folder: Path) -> list[list[str]]:
    """What each rank printed of each: the two scripts, and the blocks behind them with their checks."""
    checked = [block + "".join(check for words, check in CHECKS.items() if words in block) for block in BLOCKS]
    return pool.run(2, work.run, folder, [script("-"), script("+"), *checked])


def test_the_script_has_the_losses_and_norms_that_it_had_under_fsdp2(said: list[list[str]]) -> None:
    for before, after, *_ in said:
        assert len(told(before)) == 10
        assert told(before)[-1] < 0.8 * told(before)[0]
        assert told(after) == pytest.approx(told(before), rel=0.0003)
        assert told(after, "norm") == pytest.approx(told(before, "norm"), rel=0.005)
    assert told(said[0][0]) != told(said[1][0]), "ranks have batches of their own"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)(?: -k \"?([\w ]+))?", PAGE)
    assert len(named) > 5
    for path, words in named:
        assert (ROOT / path).exists()
        for word in filter(None, words.split(" or ")):
            assert any(word in name for name in CASES), word


def test_a_llama_of_hugging_face_trains_and_generates_as_in_one_process_and_is_saved(
    said: list[list[str]], folder: Path
) -> None:
    torch.manual_seed(0)
    block = next(block for block in BLOCKS if "LlamaConfig" in block)
    (words,) = re.findall(r"LlamaConfig\(\n(.*?)\n\)", block, re.DOTALL)
    alone = LlamaForCausalLM(eval(f"LlamaConfig({words})", {"LlamaConfig": LlamaConfig}))
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    tokens = torch.randint(1, 64, (2, 4, 16))
    for step in range(3):
        for part in range(2):
            for rank in range(2):
                rows = tokens[rank].split(2)[part]
                loss = alone(input_ids=rows, labels=rows).loss
                (loss / 4).backward()
                assert told(said[rank][-1])[2 * step + part] == pytest.approx(loss.item(), rel=1e-3)
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    prompt = torch.full((1, 4), 5)
    saved = LlamaForCausalLM.from_pretrained(folder / "best")
    text = saved.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False).tolist()
    assert said[0][-1].endswith(f"said {text}\n")
    assert said[1][-1].endswith(f"said {text}\n")
