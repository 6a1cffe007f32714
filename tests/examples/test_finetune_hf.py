"""`examples/finetune_hf.py`: what of a record is learned, packing, adapters, and whole runs in this process."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_hf
import pytest
import torch
from peft import PeftModel
from records import IGNORE, Row, collate, pack, read_records, sample, samples, stream
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.hf_integration.test_trainer import assert_same, gpt2, llama, one_thread, weights  # noqa: F401

WORDS = ["<end>", "<s>", "<system>", "<user>", "<assistant>", *"abcdefgh"]
ID = {word: i for i, word in enumerate(WORDS)}

PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <end>{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %} {% endfor %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last %}<{{ m.role }}> {{ m.content }} <end> {% endif %}{% endfor %}"
"""Forgets earlier turns, as templates do with the thoughts of a reasoning model."""

CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b c"},
    {"role": "assistant", "content": "d e"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "g"},
]
SAID = "<system> a <end> <user> b c <end> <assistant> d e <end> <user> f <end> <assistant> g <end>"


def words(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per word."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=template)


def shown(row: Row | None) -> tuple[str, str]:
    """The words of a row, and those that are learned."""
    assert row is not None and row["input_ids"].shape == row["labels"].shape
    learned = row["labels"] != IGNORE
    assert torch.equal(row["labels"][learned], row["input_ids"][learned])
    ids = row["input_ids"].tolist()
    return " ".join(WORDS[i] for i in ids), " ".join(WORDS[i] for i, yes in zip(ids, learned, strict=True) if yes)


# -- what is learned --------------------------------------------------------------------------------------------------


def test_of_a_text_everything_is_learned_but_its_first_token():
    assert shown(sample(words(), {"text": "a b c", "source": "x"}, 9)) == ("a b c <end>", "b c <end>")
    assert shown(sample(words(), {"text": "a b c"}, 2)) == ("a b", "b")


def test_of_a_prompt_and_completion_the_completion_is_learned():
    record = {"prompt": "a b", "completion": " c d"}
    assert shown(sample(words(), record, 9)) == ("a b c d <end>", "c d <end>")
    assert shown(sample(words(), record, 3)) == ("a b c", "c")
    assert sample(words(), record, 2) is None


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_conversation_the_assistants_words_are_learned(template: str):
    tokenizer = words(template=template)
    assert shown(sample(tokenizer, {"messages": CHAT}, 99)) == (SAID, "d e <end> g <end>")
    parted = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert shown(sample(tokenizer, parted, 99)) == (SAID, "g <end>")
    from_arrow = {"messages": [m | {"tool_calls": None} for m in CHAT], "tools": None}
    assert shown(sample(tokenizer, from_arrow, 99)) == (SAID, "d e <end> g <end>")


def test_the_first_message_may_be_the_assistants():
    row = sample(words(template=PLAIN), {"messages": CHAT[2:]}, 99)
    assert shown(row) == ("<assistant> d e <end> <user> f <end> <assistant> g <end>", "d e <end> g <end>")


def test_what_cannot_be_read_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        sample(words(template=LAST_ONLY), {"messages": CHAT}, 99)
    with pytest.raises(ValueError, match="this one has instruction, output"):
        sample(words(), {"instruction": "a", "output": "b"}, 99)
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"x\.jsonl:3: "):
        read_records([file])
    file.write_text('["a"]\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:1: not a JSON object"):
        read_records([file])


def test_records_with_nothing_to_learn_are_counted(capsys: pytest.CaptureFixture[str]):
    actual = samples(words(), [{"prompt": "a b", "completion": " c"}, {"prompt": "a", "completion": " c"}], 2)
    assert [shown(row) for row in actual] == [("a c", "c")]
    assert "1 records left out: nothing in their first 2 tokens" in capsys.readouterr().out


def test_texts_are_one_stream():
    rows = stream(words(), ["a b c", "d", "e f"], 4)
    assert [shown(row)[0] for row in rows] == ["a b c <end>", "d <end> e f"]


def test_directories_of_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(tmp_path / "split")
    (tmp_path / "c.txt").write_text("c")
    assert read_records([tmp_path / "one", tmp_path / "c.txt"]) == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert read_records([tmp_path / "split"]) == [{"text": "a"}, {"text": "b"}]
    assert read_records([tmp_path / "split" / "test"]) == [{"text": "a"}]


# -- packing ----------------------------------------------------------------------------------------------------------


def random_samples(lengths: list[int]) -> list[Row]:
    made = torch.Generator().manual_seed(0)
    rows = [torch.randint(90, (n,), generator=made) for n in lengths]
    return [{"input_ids": row, "labels": torch.cat([torch.tensor([IGNORE]), row[1:]])} for row in rows]


def test_packing_keeps_every_sample_whole_and_fills_rows():
    lengths = [9, 4, 4, 3, 3, 3, 2, 2, 1, 1]
    actual = random_samples(lengths)
    rows = list(pack(actual, 10))
    assert [len(row["input_ids"]) for row in rows] == [10, 10, 10, 2]
    starts = [i for row in rows for i in (row["position_ids"] == 0).nonzero().flatten().tolist()]
    assert len(starts) == len(actual)
    parts = [p for row in rows for p in row["input_ids"].split(sizes(row["position_ids"]))]
    assert sorted(p.tolist() for p in parts) == sorted(row["input_ids"].tolist() for row in actual)


def sizes(position_ids: Tensor) -> list[int]:
    starts = (position_ids == 0).nonzero().flatten().tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], len(position_ids)], strict=True)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_samples_do_not_see_each_other(make: Callable[[], Any]):
    """The sum of losses and every gradient are those of the samples alone, padding included."""
    actual = random_samples([7, 5, 4, 6, 3])
    gradients = []
    for rows in (actual, list(pack(actual, 12))):
        model = make().eval()
        model.config.use_cache = False  # as the Trainer does
        batch = collate(rows, pad=1)
        assert ("attention_mask" in batch) != ("position_ids" in batch)
        count = (batch["labels"] != IGNORE).sum()
        (model(**batch).loss * count).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert count == 20
    for name, alone in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], alone, rtol=1e-4, atol=1e-5)


def test_rows_of_one_length_need_no_mask():
    assert collate(random_samples([5, 5]), pad=1).keys() == {"input_ids", "labels"}


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a chat template and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    model = llama(dropout=0.1)
    model.config.eos_token_id = model.config.bos_token_id = None
    model.save_pretrained("model")
    words().save_pretrained("model")
    Path("chat.jinja").write_text(PLAIN)
    letters = "abcdefgh"
    chats = [[m | {"content": letters[(i + len(m["content"])) % 8]} for m in CHAT] for i in range(40)]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pairs = [{"prompt": letters[i % 8], "completion": f" {letters[(i + 1) % 8]}"} for i in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> dict[str, Any]:
    """The example's main; the history of the run."""
    argv = "--model model --optim muon --learning_rate 3e-3 --per_device_train_batch_size 4 --logging_steps 1 "
    argv += f"--save_strategy no --report_to none --use_cpu --disable_tqdm true --output_dir out {flags}"
    monkeypatch.setattr(sys, "argv", ["finetune_hf.py", *argv.split()])
    finetune_hf.main()
    folder = argv.split("--output_dir ")[-1].split()[0]
    return json.loads(Path(folder, "trainer_state.json").read_text())


others_use_old_names = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing\\w*. is deprecated:FutureWarning")


@pytest.mark.parametrize(
    "flags",
    [
        "--data pairs.jsonl",
        "--data chat.jsonl --chat_template chat.jinja --packing --bf16",
        "--data chat.jsonl --chat_template chat.jinja --eval_data chat.jsonl --dtype bfloat16 --block_size 12",
        "--data pairs.jsonl --gradient_checkpointing --gradient_accumulation_steps 2 --report_to tensorboard",
        "--data pairs.jsonl --lora --gradient_checkpointing --lora_target q_proj v_proj --learning_rate 3e-2",
    ],
)
@others_use_old_names
def test_runs_learn(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str):
    run(monkeypatch, f"{flags} --num_train_epochs 3")
    before, after = (float(x) for x in re.findall(r"evaluation \w+: +loss ([\d.]+)", capsys.readouterr().out))
    assert after < before - 0.05
    assert bool(list(Path().glob("logs/events*"))) == ("tensorboard" in flags)


@others_use_old_names
def test_adapters_train_the_base_stays_and_a_stopped_run_continues_exactly(work: Path, monkeypatch: pytest.MonkeyPatch):
    content: list[Any] = []
    make = finetune_hf.get_peft_model
    monkeypatch.setattr(finetune_hf, "get_peft_model", lambda *args: content.append(make(*args)) or content[-1])
    flags = "--data chat.jsonl --chat_template chat.jinja --packing --lora --lora_rank 4 --max_steps 6"
    flags += " --save_strategy steps --save_steps 3 --block_size 48 --output_dir"
    files = {path.name: path.read_bytes() for path in Path("model").iterdir()}
    whole = run(monkeypatch, f"{flags} whole")

    trained, base = content[0], llama()
    frozen = {
        n.replace("base_layer.", ""): p for n, p in trained.base_model.model.named_parameters() if "lora" not in n
    }
    assert_same({n: p.detach() for n, p in frozen.items()}, weights(base))
    assert {p.requires_grad for p in frozen.values()} == {False}
    adapter = load_file("whole/adapter_model.safetensors")
    assert len(adapter) == 28 and all("lora_" in name for name in adapter)  # A and B of 7 projections, twice
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    assert not Path("whole/model.safetensors").exists()
    assert {path.name: path.read_bytes() for path in Path("model").iterdir()} == files

    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "whole").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, alone = trained.eval()(input_ids=ids).logits, base.eval()(input_ids=ids).logits
        assert torch.equal(reloaded(input_ids=ids).logits, expected) and not torch.equal(alone, expected)

    shutil.copytree("whole/checkpoint-3", "again/checkpoint-3")
    resumed = run(monkeypatch, f"{flags} again --resume_from_checkpoint true")
    assert_same(load_file("again/adapter_model.safetensors"), adapter)
    losses = [[entry.get("loss") for entry in history["log_history"][-5:]] for history in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_run_of_adamw_goes_on_with_muon(work: Path, monkeypatch: pytest.MonkeyPatch):
    flags = "--data pairs.jsonl --max_steps 6 --save_strategy steps --save_steps 3 --warmup_steps 1 --optim"
    run(monkeypatch, f"{flags} adamw_torch_fused")
    shutil.rmtree("out/checkpoint-6")
    history = run(monkeypatch, f"{flags} muon --resume_from_checkpoint true")["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert list(rates.values()) == pytest.approx([0.0] + [3e-3 * (6 - t) / 5 for t in range(1, 6)])
    saved = torch.load("out/checkpoint-6/optimizer.pt", weights_only=True)
    steps = {g["name"]: {float(saved["state"][i]["step"]) for i in g["params"]} for g in saved["param_groups"]}
    assert steps == {"muon/hidden": {3.0}, "adamw/embedding": {6.0}, "adamw/vector": {6.0}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data pairs.jsonl --block_size 1", "too little data for rows of 1 tokens"),
        ("--data chat.jsonl --packing --model mamba", "MambaForCausalLM takes no position_ids"),
    ],
)
def test_what_cannot_be_trained_is_said(work: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)).save_pretrained(
        "mamba"
    )
    words().save_pretrained("mamba")
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, flags)
