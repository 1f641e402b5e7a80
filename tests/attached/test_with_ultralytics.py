"""Attached excitation in Ultralytics' trainer, by one callback."""

import shutil

import pytest
import torch

import we_surgery as ws


@pytest.fixture(scope="module")
def ultralytics(tmp_path_factory):
    """Ultralytics, with its settings in a folder of the test's and without the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        patch.setenv("YOLO_VERBOSE", "false")
        yield pytest.importorskip("ultralytics")


@pytest.fixture(scope="module")
def data(ultralytics, tmp_path_factory):
    """Four images of a square."""
    import cv2
    import numpy as np

    root = tmp_path_factory.mktemp("squares")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            image = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            cv2.rectangle(image, (5, 5), (20, 20), (0, 0, 255), -1)
            cv2.imwrite(str(root / "images" / split / f"{i}.png"), image)
            (root / "labels" / split / f"{i}.txt").write_text("0 .15 .15 .65 .15 .65 .65 .15 .65\n")
    file = root / "data.yaml"
    file.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n")
    return file


pytestmark = pytest.mark.filterwarnings("ignore")  # Ultralytics' own, of torch and of NumPy


class Run:
    """What the callback saw."""

    def __init__(self, yolo) -> None:
        self.kept: list[int] = []
        self.start: dict[str, torch.Tensor] = {}
        yolo.add_callback("on_train_start", self.attach)
        yolo.add_callback("on_train_end", self.look)

    def attach(self, trainer) -> None:
        self.trainer = trainer
        self.kept = [value.data_ptr() for value in trainer.model.state_dict().values()]
        self.excitation = ws.attach(trainer.model, trainer.optimizer, "lwe")
        named = self.excitation.named_parameters().items()
        self.start = {name: p.detach().clone() for name, p in named}
        self.steps_behind = self.excitation.steps

    def look(self, trainer) -> None:
        self.final = {n: v.clone() for n, v in trainer.model.state_dict().items()}
        self.average = {n: v.clone() for n, v in trainer.ema.ema.state_dict().items()}
        self.held = [value.data_ptr() for value in trainer.model.state_dict().values()]


def train(yolo, data, folder, **options) -> Run:
    run = Run(yolo)
    settings = {
        "data": str(data),
        "epochs": 2,
        "imgsz": 32,
        "batch": 2,
        "nbs": 2,
        "device": "cpu",
        "workers": 0,
        "plots": False,
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
        "optimizer": "SGD",
        "lr0": 0.01,
        "warmup_epochs": 0,
        "verbose": False,
        "save_period": 1,
    }
    yolo.train(**{**settings, **options})
    return run


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("yolov8n.yaml", "SGD"), ("yolo11n.yaml", "MuSGD"), ("yolo11n-seg.yaml", "SGD")],
)
def test_two_epochs_and_a_resumed_one(name, optimizer, ultralytics, data, tmp_path):
    run = train(ultralytics.YOLO(name), data, tmp_path, optimizer=optimizer)
    assert type(run.trainer.optimizer).__name__ == optimizer
    assert run.excitation.steps == 4
    assert len(run.excitation.plan.excited) > 50
    raws = run.excitation.named_parameters()
    moved = [not torch.equal(parameter, run.start[key]) for key, parameter in raws.items()]
    assert sum(moved) > 0.7 * len(moved)  # three images see little of the head
    # The average keeps the tensors of the state dict from the start, and so does the model.
    assert run.held == run.kept

    files = tmp_path / "run" / "weights"
    last = torch.load(files / "last.pt", weights_only=False)
    for file in files.glob("*.pt"):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        assert not any("we_surgery" in each for each in names), file
    opened = ultralytics.YOLO(files / "best.pt")
    assert len(opened.predict(torch.rand(1, 3, 32, 32), verbose=False)) == 1
    exported = torch.jit.load(opened.export(format="torchscript", imgsz=32))
    assert exported(torch.rand(1, 3, 32, 32)) is not None
    for key, saved in last["model"].float().state_dict().items():
        if key in raws:
            trained, raw = run.final[key], raws[key]
            assert torch.equal(saved, run.average[key].half().float())
            assert (saved - trained).norm() < 0.02 * trained.norm()
            assert (saved - raw).norm() > 0.1 * raw.norm()

    # The checkpoint of the first epoch goes on, with the raw weights it was saved with.
    first = files / "epoch0.pt"
    state = torch.load(first, weights_only=False)["optimizer"]["state"]["we_surgery"]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    resumed = train(
        ultralytics.YOLO(tmp_path / "again" / "weights" / "epoch0.pt"), data, tmp_path, resume=True
    )
    assert (resumed.steps_behind, resumed.excitation.steps) == (2, 4)
    for key, saved in state["weights"].items():
        assert torch.equal(resumed.start[key], saved["raw"])
