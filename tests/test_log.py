"""What TensorBoard finds in a run's directory besides scalars and texts, of which tests/test_report.py tells."""

import dataclasses

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS

from core.config import TrainConfig, resolve
from core.log import Log
from lib.cli import UserError


@pytest.fixture
def cfg(tmp_path):
    return resolve(TrainConfig(log_dir=str(tmp_path), run_name="r", max_iters=9, bias=False), n_windows=50)


def events_of(directory):
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    return events


def plugin_data(events, tag):
    return events.SummaryMetadata(tag).plugin_data.content


def test_hyperparameters_are_those_of_the_configuration(cfg, tmp_path):
    for step in (0, 2):  # killed and resumed
        log = Log(cfg)
        log.open(step)
        log.scalars({"val/loss": 2.5}, step + 1, 0.0)
        if step:
            log.events.finished()
        log.close()
        events = events_of(tmp_path / "r")
        start = metadata.parse_session_start_info_plugin_data(plugin_data(events, metadata.SESSION_START_INFO_TAG))
        found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        expected = {name: value for name, value in dataclasses.asdict(cfg).items() if value is not None}
        for name in ("resume", "data_dir", "out_dir", "log_dir", "run_name"):
            expected.pop(name)
        assert found == expected and found["bias"] is False
        assert (metadata.SESSION_END_INFO_TAG in events.summary_metadata) == bool(step)
    end = metadata.parse_session_end_info_plugin_data(plugin_data(events, metadata.SESSION_END_INFO_TAG))
    assert end.status == STATUS_SUCCESS
    assert [event.step for event in events.Scalars("val/loss")] == [1, 3]
    assert [path.suffix for path in (tmp_path / "r").iterdir() if path.is_dir()] == []


def test_both_losses_are_in_one_chart(cfg, tmp_path):
    log = Log(cfg)
    log.open(0)
    log.close()
    (event,) = events_of(tmp_path / "r").Tensors("custom_scalars__config__")
    (chart,) = Layout.FromString(event.tensor_proto.string_val[0]).category[0].chart
    assert list(chart.multiline.tag) == ["train/loss", "val/loss"]


def test_until_it_is_opened_nothing_is_written(cfg, tmp_path):
    log = Log(cfg)
    log.scalars({"val/loss": 2.5}, 1, 0.0)
    log.text("samples", "a", 1, 0.0)
    log.events.finished()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_log_in_one_directory(cfg, tmp_path):
    """Their checkpoints are in different directories."""
    first, second = Log(cfg), Log(cfg)
    first.open(0)
    with pytest.raises(UserError, match=r"another run is logging in .*choose another --run_name"):
        second.open(0)
    first.close()
    second.open(0)
    second.close()
