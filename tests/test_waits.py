"""How often an update waits for the device that it computes on: every look at a number there is one."""

import pytest
import region_students as small
import torch
from test_vilt import SIZES, inputs_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tdlib.config import RunConfig, apply_arm
from tdlib.students.registry import load_student
from tdlib.training import objective
from tdlib.training.prepare import prepare
from tdlib.training.run import train_run
from tdlib.training.trainer import DistillationTrainer

aten = torch.ops.aten
LOOKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
PLACES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # wait for masks alone


class Looks(TorchDispatchMode):
    """Counts the operators whose result, or its size, a processor cannot know before a device is done."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = args[1] if func.overloadpacket in PLACES else ()
        by_mask = any(mask is not None and mask.dtype == torch.bool for mask in masks)
        self.count += func.overloadpacket in LOOKS or by_mask
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts whole tensors that are fetched, which no operator shows on the processor."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in ("tolist", "cpu", "numpy")
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts what waits for a device while it is open."""

    def __init__(self):
        self.modes = Looks(), Reads()

    @property
    def count(self) -> int:
        return sum(mode.count for mode in self.modes)

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


@pytest.mark.parametrize(
    "look",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
     lambda x: x.tolist(), lambda x: x.cpu(), lambda x: int(x.max()), lambda x: x.masked_select(x > 0)],
)  # fmt: skip
def test_looks_are_counted(look):
    values = torch.arange(4)
    with Waits() as waits:
        values + values[values]
    assert waits.count == 0
    with waits:
        look(values)
    assert waits.count == 1


@pytest.mark.parametrize(
    ("arm", "pool"),
    [("finetune", "subset"), ("naive_global", "subset"), ("clip_td", "subset"),
     ("clip_td_repaired", "subset"), ("truth_only", "subset"), ("clip_td", "train"),
     ("clip_td_extra", "subset")],
)  # fmt: skip
def test_an_update_looks_at_the_device_once(
    world, student_folder, teacher_folder, own_cache, tmp_path, monkeypatch, arm, pool
):
    """To see that all is finite, before the optimizer steps."""
    monkeypatch.setattr(objective, "GATHERING", set())  # as on a device
    config = apply_arm(
        RunConfig.from_parameters(
            data_dir=str(world), student=str(student_folder), teacher=f"local-dir:{teacher_folder}",
            arm=arm, shots=0.2, epochs=1, batch_size=4, eval_splits=["val"], probe_examples=0,
            feature_pool=pool,
        )
    )  # fmt: skip
    waits = Waits()

    def counted(real):
        def run(*given, **options):
            with waits:
                return real(*given, **options)

        return run

    for name in ("training_step", "_clip_grad_norm"):  # what happens to a batch that is there
        monkeypatch.setattr(DistillationTrainer, name, counted(getattr(DistillationTrainer, name)))
    metrics = train_run(config, prepare(config, whole_splits=False), tmp_path / "run")
    assert metrics["updates"] > 1 and waits.count == metrics["updates"]


@pytest.mark.parametrize("kind", [small.uniter, small.vlbert])
def test_students_of_regions_never_wait(kind):
    student = small.weighty(kind)
    inputs = small.inputs_of(objects=kind is not small.uniter)
    with torch.no_grad(), Waits() as waits:
        student(**inputs, output_hidden_states=True)
    assert waits.count == 0


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_vilt_waits_for_pictures_of_several_sizes_alone(student_folder, sizes):
    student = load_student(str(student_folder))
    with torch.no_grad(), Waits() as waits:
        student(**inputs_of(sizes), output_hidden_states=True)
    assert waits.count == (len(set(sizes)) > 1)
