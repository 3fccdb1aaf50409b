"""Train a GPT.

    python train_gpt2.py configs/quickstart.py
    python train_gpt2.py configs/quickstart.py --learning_rate=3e-4 --run_name=slower
    python train_gpt2.py configs/quickstart.py --resume
    python train_gpt2.py --help
"""

import dataclasses
import math
import shlex
import shutil
import sys
from pathlib import Path

from torch import Tensor

from core import huggingface
from core.checkpoint import Progress, Run, newest_first
from core.config import SHAPE, TrainConfig, build_config, file_values, help_text, read_values, resolve
from core.corpus import CORPORA, open_corpus, prepare_text
from core.dataset import TokenDataset, batches
from core.evaluation import Evaluation, evaluate
from core.preflight import check_length, check_run, vocabulary_message
from core.report import Report, out_of_memory_message
from core.tokenizer import Tokenizer
from core.trainer import Diverged, Trainer
from lib.cli import UserError, run_script
from lib.device import out_of_memory_as
from lib.files import atomic_write, make_directory, read_text
from lib.signals import StopSignals
from model import GPT


@dataclasses.dataclass
class Trained:
    """What `train` returns: the model, its training data, and its progress."""

    model: GPT
    data: TokenDataset
    progress: Progress
    signal: int | None  # the one that stopped the run early


def train(cfg: TrainConfig) -> Trained:
    """Train with a config from core.preflight.check_run; a run that finishes or is stopped is saved.

    UserError for data, checkpoints or directories that do not fit; Diverged on a non-finite loss,
    gradient, weight or moment.
    """
    corpus = open_corpus(cfg.dataset, cfg.data_dir)
    check_length(cfg, len(corpus.train))
    train_data = TokenDataset(corpus.train, cfg.block_size, cfg.stride, corpus.tokenizer)
    val_data = TokenDataset(corpus.val[: cfg.eval_tokens], cfg.block_size, tokenizer=corpus.tokenizer)
    cfg = resolve(cfg, len(train_data))
    with Run(cfg, corpus) as run:
        trainer = Trainer(cfg, corpus.tokenizer.vocab_size)
        progress = run.restore(trainer) if cfg.resume else None
        if progress is None and cfg.init_from:
            trainer.model.load_state_dict(pretrained_weights(cfg, corpus.tokenizer))
        progress = progress or Progress()
        with Report(run, trainer, progress) as report, StopSignals() as stop:
            report.start()
            steps = () if progress.finished(cfg) else batches(train_data, cfg, progress.step, trainer.device)
            for batch in steps:
                progress.add(trainer.step(batch, progress.step))
                report.step_done()
                if progress.step == 1 or due(progress.step, cfg.log_interval):
                    report.training()
                with report.timer.paused():
                    if progress.step == cfg.max_iters or due(progress.step, cfg.eval_interval):
                        report.evaluation(validate(run, trainer, progress, val_data))
                    signal = stop.received  # read once: a later one counts for the next step
                    ending = progress.finished(cfg) or signal
                    if ending or due(progress.step, cfg.checkpoint_interval):
                        run.save(trainer, progress, required=bool(ending))
                if ending:
                    break
            report.end()
    return Trained(trainer.model, train_data, progress, None if progress.finished(cfg) else stop.received)


def due(step: int, interval: int) -> bool:
    return step % interval == 0


def validate(run: Run, trainer: Trainer, progress: Progress, val_data: TokenDataset) -> Evaluation:
    """Evaluate, and keep the best model so far as best.pt."""
    trainer.check_finite()
    result = evaluate(trainer.forward, val_data, trainer.cfg.batch_size, trainer.device, trainer.dtype)
    if not math.isfinite(result.loss):
        raise trainer.diverged(progress.step - 1, "validation loss")
    best = progress.best_val_loss, progress.best_step
    if progress.evaluated(result.loss) and not run.save(trainer, progress, "best.pt"):
        progress.best_val_loss, progress.best_step = best  # it is not on the disk
    return result


def pretrained_weights(cfg: TrainConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The weights of init_from, cut to block_size positions. UserError if the vocabularies differ."""
    weights = huggingface.find(cfg.init_from, cfg.data_dir)
    if tokenizer.vocabulary() != huggingface.load_tokenizer(weights, cfg.data_dir).vocabulary():
        raise UserError(vocabulary_message(cfg, weights))
    state = huggingface.fetch_state(weights)
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][: cfg.block_size]
    print(f"weights from {weights.directory}")
    return state


def train_model(config_path: str | None = None, data_path: str | None = None, epochs: float | None = None,
                save_path: str | None = None, **fields: object) -> tuple[GPT, TokenDataset]:
    """Train from Python; return (model, training data with its `tokenizer`).

    config_path: a config file. data_path: a UTF-8 text, prepared as a data set named after the file, with
    GPT-2's tokenizer if the config's data set is a built-in one that has it, else as characters. epochs and other
    `fields` override the file. save_path: copy the last checkpoint here. UserError if any of these is invalid.
    """
    values, problems = file_values(config_path, fields | ({} if epochs is None else {"epochs": epochs}))
    if save_path and Path(save_path).is_dir():
        problems.append(f"save_path={save_path} is a directory: give a file name")
    if data_path:
        _, tokenizer_kind = CORPORA.get(values.get("dataset", TrainConfig.dataset), (None, "char"))
        values["dataset"] = Path(data_path).stem
        draft, invalid = build_config(values, unknown=SHAPE)
        if problems or invalid:
            raise UserError(*problems, *invalid)
        prepare_text(read_text(data_path), draft.dataset, tokenizer_kind, draft.data_dir)
    cfg = check_run(values, problems)
    if save_path:
        make_directory(Path(save_path).parent)
    trained = train(cfg)
    if save_path:
        with atomic_write(Path(save_path)) as [temporary]:
            shutil.copyfile(newest_first(cfg.run_dir)[0], temporary)
    return trained.model, trained.data


def main(argv: list[str]) -> int:
    if {"--help", "-h"} & set(argv):
        print(help_text())
        return 0
    cfg = check_run(*read_values(argv))
    try:
        with out_of_memory_as(out_of_memory_message(cfg)):
            trained = train(cfg)
    except Diverged as error:
        newest = next(iter(newest_first(cfg.run_dir)), "none")
        print(f"error: {error}; last good checkpoint: {newest}", file=sys.stderr)
        return 3
    if trained.signal:
        again = [*argv, *([] if cfg.resume else ["--resume"])]
        print(f"resume with: python train_gpt2.py {shlex.join(again)}")
        return 128 + trained.signal
    return 0


if __name__ == "__main__":
    run_script(main)
