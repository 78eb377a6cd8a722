"""Runs do not mix: one process per folder, and no result is taken for that of other inputs."""

import json
import multiprocessing
import os
import shutil
import time

import child
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small import WORDS, change, contents, copy_tiny, refused, run
from test_plot import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import plot
from run import checkpoint, lock, origin, ownfile, start
from run.runs import read_folder, read_runs
from trainer.methods import ALGORITHMS, MORE
from trainer.policy import load_policy

pytestmark = pytest.mark.usefixtures("quiet_run")
TINY = ROOT / "tiny"


@pytest.fixture
def model_copy(tmp_path):
    return copy_tiny(tmp_path / "model")


def stopped(words, folder, step=2):
    """Run train.py in a child until Ctrl-C in this step."""
    status, log = child.run(words, folder / "log", "interrupt_in_step", step, 1)
    assert status == 130, log


# One process per folder


def test_a_second_run_in_the_same_folder_is_refused_with_the_process_id(file, tmp_path, capsys):
    """Refused while the first process lives. Killed, it leaves its lock file behind.

    The next run takes the folder all the same: the lock itself ends with its process.
    """
    out = tmp_path / "run"
    words = [*WORDS, "--data", file, "--steps", "10000", "--save-every", "1", "--out", out]
    first = child.start(words, tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step-000001").exists():
        assert first.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    try:
        for again in (
            [*WORDS, "--data", file, "--out", out],
            [*WORDS, "--data", file, "--out", out, "--overwrite"],
            ["--resume", out],
            ["--eval-only", "--preset", "tiny", "--out", out],
        ):
            line = refused(capsys, *again)
            assert f"{out} is in use by process {first.pid} on " in line
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    assert (out / lock.NAME).exists()
    words = [*WORDS, "--data", file, "--out", out, "--overwrite"]
    assert run(*words) == 0
    assert not (out / lock.NAME).exists()


def test_a_folder_is_locked_before_its_run_is_looked_for(file, tmp_path, capsys, monkeypatch):
    """The other run has the folder, but has written nothing yet, as while it loads its model."""
    monkeypatch.setattr(start, "load_policy", lambda *_: pytest.fail("it had loaded the model"))
    with lock.locked(tmp_path / "run"):
        line = refused(capsys, *WORDS, "--data", file, "--out", tmp_path / "run")
    assert f"process {os.getpid()} on " in line
    assert not (tmp_path / "run").exists()


def hold_often(folder, times, failed):
    """Locks the folder again and again; sets `failed` if another process holds it at that time.

    O_EXCL fails if the file exists, so only one process at a time can have made it.
    """
    for _ in range(times):
        try:
            with lock.locked(folder):
                os.close(os.open(folder / "mine", os.O_CREAT | os.O_EXCL))
                (folder / "mine").unlink()
        except ValueError:
            pass
        except FileExistsError:
            failed.set()


def test_no_two_processes_hold_a_folder_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    failed = context.Event()
    (tmp_path / "run").mkdir()
    args = (tmp_path / "run", 1000, failed)
    workers = [context.Process(target=hold_often, args=args) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed.is_set() and not any(worker.exitcode for worker in workers)


def test_the_lock_ends_with_an_error_and_leaves_no_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lock.locked(tmp_path / "a" / "run"):
            assert (tmp_path / "a" / "run" / lock.NAME).exists()
            raise KeyError
        assert not (tmp_path / "a").exists()


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path, capsys):
    (tmp_path / lock.NAME).mkdir()
    line = refused(capsys, *WORDS, "--out", tmp_path)
    assert line.endswith(f"({tmp_path / lock.NAME}: Is a directory)")
    assert (tmp_path / lock.NAME).is_dir()


def test_where_nothing_can_be_locked_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.locked(tmp_path):
        pass
    assert "start no other run there" in capsys.readouterr().out
    monkeypatch.setattr(lock, "fcntl", None)  # Windows
    with lock.locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir() and not list((tmp_path / "run").iterdir())


# What a run was made from


def test_weights_checksum_sees_every_weight():
    model = load_policy("tiny")[0]
    first = origin.weights_checksum(model)
    assert origin.weights_checksum(load_policy("tiny")[0]) == first
    seen = {first}
    for weight in model.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(origin.weights_checksum(model))
    assert len(seen) == 1 + len(list(model.parameters()))
    # Two weights that change places make another model: a plain sum would not see it.
    with torch.no_grad():
        a, b = (layer.input_layernorm.weight for layer in model.model.layers[:2])
        a.copy_(torch.arange(128.0))
        b.copy_(-torch.arange(128.0))
        before = origin.weights_checksum(model)
        a.neg_(), b.neg_()
    assert origin.weights_checksum(model) != before


def test_code_checksums_are_of_the_files_that_determine_the_numbers(tmp_path, monkeypatch):
    files = origin.code_checksums("grpo_s")
    always = {"train.py", "rewards.py", "tiny/problems.py", "trainer/policy.py", "grpo.py"}
    assert always | {"grpo_s.py", "gtpo.py"} <= files.keys()
    assert not {"plot.py", "run/runs.py", "tepo.py"} & files.keys()
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for module in (origin, ownfile):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert origin.code_checksums("grpo_s") == files
    with open(tmp_path / "gtpo.py", "a") as source:
        source.write("\n")
    versions = {"torch": "2"}
    now = {"code": origin.code_checksums("grpo_s"), "versions": versions}
    assert origin.other_code({"code": files, "versions": versions}, now) == "gtpo.py"


def test_code_checksums_follow_the_imports_of_more():
    """kl_cov imports from clip_cov; dhpo imports whole modules, which import from grpo."""
    for algo, ours in (
        ("kl_cov", {"grpo.py", "more/clip_cov.py", "more/kl_cov.py"}),
        ("dhpo", {"grpo.py", "dapo.py", "gspo.py", "tepo.py", "more/dhpo.py"}),
        ("ktae", {"grpo.py", "dapo.py", "more/ktae.py"}),
        ("gspo", {"grpo.py", "gspo.py"}),
    ):
        files = origin.code_checksums(algo).keys()
        others = {f"{name}.py" for name in ALGORITHMS} | {f"more/{name}.py" for name in MORE}
        assert files & others == ours


def test_other_code_names_files_and_versions():
    held = {"code": {"a.py": "1", "b.py": "2"}, "versions": {"torch": "2.0"}}
    now = {"code": {"a.py": "1", "c.py": "3"}, "versions": {"torch": "2.1"}}
    assert origin.other_code(held, held) == ""
    assert origin.other_code(held, now) == "b.py; c.py; torch 2.0, now 2.1"
    assert origin.other_code({}, now) == "code not recorded; versions not recorded"
    mixed = origin.both(held, now)
    assert mixed["versions"] == {"torch": "2.0, then 2.1"} and mixed["code"]["a.py"] == "1"
    assert origin.other_code(mixed, now) and origin.other_code(mixed, held)
    assert origin.both(mixed, now) == mixed  # resumed once more, with the same


# --model RUN


def test_a_run_stands_for_its_model_or_its_latest_checkpoint(file, tmp_path, capsys):
    """A finished run: model/. One that was stopped or got more steps: its last checkpoint."""
    out = tmp_path / "run"
    words = [*WORDS, "--data", file, "--save-every", "1", "--out", out]
    stopped(words, tmp_path)
    latest = out / "checkpoints" / "step-000002"
    assert checkpoint.model_folder(str(out)) == str(latest)
    capsys.readouterr()
    model, tokenizer, eos_ids, _ = load_policy(checkpoint.find_model(str(out)))
    assert capsys.readouterr().out == f"--model {out} is a run: taking {latest}\n"
    again = AutoModelForCausalLM.from_pretrained(latest)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert again.generation_config.eos_token_id == [0] and eos_ids == [0]
    text = AutoTokenizer.from_pretrained(latest)("1+1=2\n").input_ids
    assert text == AutoTokenizer.from_pretrained(TINY)("1+1=2\n").input_ids
    assert run("--resume", out) == 0
    assert checkpoint.model_folder(str(out)) == str(out / "model")
    stopped(["--resume", out, "--steps", "9"], tmp_path, 3)
    assert checkpoint.model_folder(str(out)) == str(out / "checkpoints" / "step-000007")
    shutil.rmtree(out / "checkpoints")
    assert checkpoint.model_folder(str(out)) == str(out / "model")
    shutil.rmtree(out / "model")
    words = [*WORDS, "--model", out, "--data", file, "--out", tmp_path / "other"]
    assert f"--model {out} is a run without a model or a checkpoint" in refused(capsys, *words)


def test_what_is_no_run_stands_for_itself(model_copy):
    for name in ("tiny", "Qwen/Qwen2.5-0.5B", str(model_copy)):
        assert checkpoint.model_folder(name) == name


def test_a_model_with_sampling_flags_that_transformers_refuses_is_saved(model_copy, file, tmp_path):
    """Llama-2's generation_config has a temperature without do_sample; its EOS must stay."""
    change(model_copy / "generation_config.json", temperature=0.6)
    words = [*WORDS, "--model", model_copy, "--data", file, "--steps", "1", "--out", tmp_path / "r"]
    assert run(*words) == 0
    config = json.loads((tmp_path / "r" / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [0] and config["pad_token_id"] == 1


# Checkpoints

LINE = '{"phase": "train", "step": 1}\n'


@pytest.fixture
def saved(tmp_path):
    """save(step): adds a line to metrics.jsonl and writes a checkpoint."""
    model, tokenizer, _, _ = load_policy("tiny")
    optimizer = torch.optim.AdamW(model.parameters())

    def save(step):
        with open(tmp_path / "metrics.jsonl", "a") as lines:
            lines.write(LINE)
        sizes = checkpoint.line_sizes(tmp_path)
        checkpoint.save(tmp_path, step, model, tokenizer, optimizer, sizes, cursor=step)

    save.model, save.optimizer = model, optimizer
    return save


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(saved, tmp_path, monkeypatch):
    """In order: the lines it counts on, its files, its folder; the name; the folder of names."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append(os.path.relpath(path, tmp_path))
        fsync(descriptor)

    def renamed(old, new):
        if str(new).endswith("step-000003"):
            seen.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    saved(3)
    part = "checkpoints/step-000003.part"
    files = [f"{part}/{path.name}" for path in (tmp_path / "checkpoints" / "step-000003").iterdir()]
    assert len(files) >= 6 and f"{part}/state.pt" in files
    assert seen[0] == "metrics.jsonl" and seen[-3:] == [part, "renamed", "checkpoints"]
    assert sorted(seen[1:-3]) == sorted(files)


def test_load_takes_the_latest_and_cuts_the_lines_to_it(saved, tmp_path):
    for step in (8, 9, 10):
        saved(step)
    weight = next(saved.model.parameters())
    before, state = weight.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        weight.add_(1)
    torch.rand(3)
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write("more")
    (tmp_path / "samples.jsonl").write_text("made after the checkpoint")
    found = checkpoint.load(tmp_path, saved.model, saved.optimizer, steps=20)
    assert found == {"step": 10, "cursor": 10}
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "metrics.jsonl").read_text() == LINE * 3
    assert (tmp_path / "samples.jsonl").read_text() == ""
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000009", "step-000010"]


# --resume


def test_resume_with_another_start_model_of_the_same_name(model_copy, file, tmp_path, capsys):
    """Its KL would have another reference. The same weights at another place are the same model."""
    out = tmp_path / "run"
    words = [*WORDS, "--model", model_copy, "--data", file, "--save-every", "1", "--out", out]
    stopped(words, tmp_path)
    weights = load_file(model_copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, model_copy / "model.safetensors", {"format": "pt"})
    before = contents(out)
    line = refused(capsys, "--resume", out)
    assert f"the start model {model_copy} is not what it was when the run began" in line
    assert contents(out) == before
    shutil.rmtree(model_copy)
    copy_tiny(model_copy)
    assert run("--resume", out) == 0


def test_resume_with_other_code_is_noted_in_a_line(file, tmp_path, capsys):
    out = tmp_path / "run"
    words = [*WORDS, "--data", file, "--save-every", "1", "--out", out]
    stopped(words, tmp_path)
    config = json.loads((out / "config.json").read_text())
    code, versions = ({"train.py": "00000000"}, {"torch": "1.0"})
    change(out / "config.json", code=config["code"] | code, versions=config["versions"] | versions)
    capsys.readouterr()
    assert run("--resume", out) == 0
    told = capsys.readouterr().out
    note = f"note: changed since the run began: train.py; torch 1.0, now {torch.__version__}\n"
    assert note in told and told.count("note:") == 1
    held = json.loads((out / "config.json").read_text())
    assert held["versions"]["torch"] == f"1.0, then {torch.__version__}"
    assert held["code"]["train.py"].startswith("00000000, then ")


# plot.py runs/*


def test_what_is_no_run_is_skipped_with_a_note(tmp_path, capsys):
    runs = tmp_path / "runs"
    write_run(runs / "tepo-tiny-s0")
    (runs / "eval-tiny-tiny-s0").mkdir()
    (runs / "eval-tiny-tiny-s0" / "eval.json").write_text("{}")
    (runs / "waiting").mkdir()
    (runs / "curves.png").write_bytes(b"")
    for algo in ("tepo", "gspo"):
        write_run(runs / "compare" / f"{algo}-s0", algo)
    write_run(runs / "compare" / "tepo-s1", seed=1)
    write_run(runs / "compare" / "tepo-s0-u16", updates=16)
    (runs / "compare" / "methods.csv").write_text("not read")
    out = tmp_path / "curves.png"
    plot.main([*map(str, sorted(runs.iterdir())), "--out", str(out)])
    printed = capsys.readouterr()
    assert out.exists() and printed.out == f"{out}\n"
    notes = printed.err.splitlines()
    assert len(notes) == 4 and all(line.startswith("note: skipped ") for line in notes)
    for part in ("s0: an evaluation", "waiting: no metrics.jsonl", "curves.png: neither"):
        assert part in printed.err
    assert f"{runs / 'compare' / 'tepo-s0'}: another run of the same experiment" in printed.err
    read = read_runs(sorted(runs.iterdir()))
    found = [(run["algo"], run["seed"], run["settings"]["updates"]) for run in read]
    assert found == [("tepo", 0, 4), ("gspo", 0, 4), ("tepo", 0, 16), ("tepo", 1, 4)]


def test_a_folder_of_one_run_is_read_as_it_is(tmp_path):
    row = read_folder(write_run(tmp_path / "run", steps=0))["rows"].iloc[0]
    assert (row["phase"], row["step"]) == ("eval", 0)
    assert (row["ci_lo"], row["ci_hi"]) == pytest.approx((0.15, 0.25))
    assert (row["accuracy"], row["pass_at_k"], row["k"], row["n"]) == (0.2, 0.5, 4, 100)


def test_nothing_left_to_draw_is_an_error(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "eval.json").write_text("{}")
    with pytest.raises(SystemExit) as exit:
        plot.main([str(tmp_path / "eval"), str(tmp_path)])
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("plot.py: error: ") and line.count("\n") == 1
    assert "eval: an evaluation, no run; " in line
