"""Train a GPT.

    python train_gpt2.py configs/quickstart.py
    python train_gpt2.py configs/quickstart.py --learning_rate=3e-4 --run_name=slower
    python train_gpt2.py configs/quickstart.py --resume
    python train_gpt2.py configs/quickstart.py --plan
    python train_gpt2.py --help
"""

import dataclasses
import math
import shutil
import signal
import sys
from pathlib import Path

from core.checkpoint import Progress, Run, newest_first
from core.config import SHAPE, TrainConfig, build_config, default_run_name, file_values, read_values, resolve
from core.corpus import CORPORA, is_free_name, open_corpus, prepare_text
from core.dataset import TokenDataset, batches
from core.evaluation import evaluate
from core.help import help_text
from core.plan import print_plan, wants_plan
from core.preflight import check_length, check_run
from core.pretrained import pretrained_weights
from core.report import Report, out_of_memory_message
from core.runs import free_run_name
from core.trainer import Diverged, Trainer
from lib.cli import UserError, command_line, run_script
from lib.device import choose_device, out_of_memory_as
from lib.distributed import ALONE, Processes, joined, launcher, local_rank, world_size
from lib.files import atomic_write, check_writable, read_text, reason
from lib.signals import StopSignals
from model import GPT


@dataclasses.dataclass
class Trained:
    """What `train` returns."""

    model: GPT
    data: TokenDataset
    progress: Progress
    checkpoint: Path | None  # the newest
    signal: int | None  # the one that stopped the run early


def train(cfg: TrainConfig, processes: Processes = ALONE) -> Trained:
    """Train with a config from core.preflight.check_run; a run that finishes or is stopped is saved.

    UserError for data, checkpoints or directories that do not fit; Diverged on a non-finite loss,
    gradient, weight or moment: in all processes.
    """
    # each: all processes do it and fail together; lead: the first one does it for all; same: they must agree
    corpus = processes.each(lambda: open_corpus(cfg.dataset, cfg.data_dir, verify=local_rank() == 0))
    processes.same(corpus.fingerprint, f"{cfg.data_dir}/{cfg.dataset} is not the first process's data: copy them")
    processes.lead(lambda: check_length(cfg, len(corpus.train)))
    train_data = TokenDataset(corpus.train, cfg.block_size, cfg.stride, corpus.tokenizer)
    val_data = TokenDataset(corpus.val[: cfg.eval_tokens], cfg.block_size, tokenizer=corpus.tokenizer)
    cfg = processes.lead(lambda: resolve(cfg, len(train_data)))
    with Run(cfg, corpus, processes) as run:
        trainer = Trainer(cfg, corpus.tokenizer.vocab_size, processes)
        progress = run.restore(trainer) if cfg.resume else None
        if progress is None and cfg.init_from:
            trainer.model.load_state_dict(processes.lead(lambda: pretrained_weights(cfg, corpus.tokenizer)))
        progress = progress or Progress()
        with StopSignals(processes) as stop, Report(run, trainer, progress, stop) as report:
            report.start()

            def proceed(n_done: int) -> bool:
                report.micro_batch_done(n_done)
                return not stop.agree()

            for batch in () if progress.finished(cfg) else batches(train_data, cfg, progress.step):
                loss = trainer.step(batch, proceed)
                if loss is None:  # stopped between two micro-batches
                    break
                progress.add(loss)
                report.step_done()
                if progress.step == 1 or due(progress.step, cfg.log_interval):
                    report.training()
                with report.timer.paused():
                    if progress.step == cfg.max_iters or due(progress.step, cfg.eval_interval):
                        validate(run, trainer, progress, val_data, report)
                    if progress.finished(cfg) or stop.agree():
                        break
                    if due(progress.step, cfg.checkpoint_interval):
                        run.save(trainer, progress)
            if progress.step > 0 and not run.holds(progress.step):
                run.save(trainer, progress, required=True)
            report.end()
    return Trained(trainer.model, train_data, progress, run.newest, None if progress.finished(cfg) else stop.agreed)


def due(step: int, interval: int) -> bool:
    return step % interval == 0


def validate(run: Run, trainer: Trainer, progress: Progress, val_data: TokenDataset, report: Report) -> None:
    """Evaluate, and keep the best model so far as best.pt."""
    trainer.check_finite()
    result = evaluate(trainer.forward, val_data, trainer.cfg.batch_size, trainer.device, trainer.dtype,
                      trainer.processes)
    if not math.isfinite(result.loss):
        raise trainer.diverged(progress.step - 1, "validation loss")
    report.log_evaluation(result)  # first: a run that resumes from best.pt does not evaluate again
    best = progress.best_val_loss, progress.best_step
    if progress.evaluated(result.loss) and not run.save(trainer, progress, "best.pt"):
        progress.best_val_loss, progress.best_step = best  # it is not on the disk
    report.evaluation(result)


def train_model(config_path: str | Path | None = None, data_path: str | Path | None = None, epochs: float | None = None,
                save_path: str | Path | None = None, **fields: object) -> tuple[GPT, TokenDataset]:
    """Train from Python; return (model, training data with its `tokenizer`).

    config_path: a config file. data_path: a UTF-8 text, prepared as a data set named after the file, with
    GPT-2's tokenizer if the config's data set is a built-in one that has it, else as characters. epochs and other
    `fields` override the file. run_name defaults to the text's, the config's or the data set's, with -2, -3, … if
    such runs exist (resume=True: the last of them). save_path: copy the last checkpoint here. UserError for bad values.
    """
    if world_size() > 1:
        raise UserError("train_model trains in one process: start `torchrun … train_gpt2.py` for several")
    values, problems = file_values(config_path, fields | ({} if epochs is None else {"epochs": epochs}))
    is_named = values.get("run_name") is not None
    if not is_named:
        values["run_name"] = Path(data_path).stem if data_path else default_run_name(config_path, values)
    if data_path and fields.get("dataset", TrainConfig.dataset) not in CORPORA:
        problems.append(f"data_path={data_path} and dataset={fields['dataset']}: give one of them")
    if data_path:
        _, tokenizer_kind = CORPORA.get(values.get("dataset", TrainConfig.dataset), (None, "char"))
        values["dataset"] = Path(data_path).stem
        if not is_free_name(values["dataset"]):
            problems.append(f"{data_path} cannot become a data set of its own name: rename it")
    draft, invalid = build_config(values, unknown=SHAPE)
    if data_path and (problems or invalid):
        raise UserError(*problems, *invalid)
    if not is_named and draft.run_name:
        values["run_name"] = free_run_name(draft)
    if save_path and not (problems or invalid):
        check_writable(Path(save_path))
    if data_path:
        prepare_text(read_text(data_path), draft.dataset, tokenizer_kind, draft.data_dir)
    cfg = check_run(values, problems)
    trained = train(cfg)
    if save_path and trained.checkpoint:  # it may have been stopped before the first step
        try:
            with atomic_write(Path(save_path)) as [temporary]:
                shutil.copyfile(trained.checkpoint, temporary)
        except OSError as error:
            raise UserError(f"cannot write {save_path}: {reason(error)}; the run is in {cfg.run_dir}") from None
    if trained.signal:  # now it is the caller's
        signal.raise_signal(trained.signal)
    return trained.model, trained.data


def main(argv: list[str]) -> int:
    with joined() as processes:
        return run(argv, processes)


def run(argv: list[str], processes: Processes) -> int:
    """Do what the command line says, as one of `processes`; return the exit code."""
    if {"--help", "-h"} & set(argv):
        print(help_text())
        return 0
    if wants_plan(argv):
        return print_plan(argv, processes)
    values, problems = read_values(argv)
    processes.same(repr((values, problems)), "its flags or config differ from the first process's: make them equal")
    cfg = processes.lead(lambda: check_run(values, problems, processes))
    if processes.size > 1 and cfg.device == "cuda":
        processes.each(lambda: choose_device(f"cuda:{local_rank()}"))
    try:
        with out_of_memory_as(out_of_memory_message(cfg)):
            trained = train(cfg, processes)
    except Diverged as error:
        newest = next(iter(newest_first(cfg.run_dir)), "none")
        print(f"error: {error}; last good checkpoint: {newest}", file=sys.stderr)
        return 3
    if trained.signal:
        again = [*argv, *([] if cfg.resume else ["--resume"])]
        print(f"resume with: {launcher(processes)} train_gpt2.py {command_line(again)}", file=sys.stderr)
        return 128 + trained.signal
    return 0


if __name__ == "__main__":
    run_script(main, outlives_output=True)
