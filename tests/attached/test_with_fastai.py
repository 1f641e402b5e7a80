"""Attached excitation in fastai's Learner, by one callback, with optimizers of torch."""

import pytest
import torch
from equal_forms import Net, batches

import we_surgery as ws

pytest.importorskip("fastai")
pytestmark = pytest.mark.filterwarnings("ignore")  # fastai's own, of torch and of NumPy


def learner(folder):
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from torch.utils.data import DataLoader, TensorDataset

    class Excite(Callback):
        def before_fit(self):
            if not hasattr(self.learn, "excitation"):
                torch.manual_seed(1)
                self.learn.excitation = ws.attach(self.model, self.opt.opt, "lwe+mwe")

    torch.manual_seed(0)
    x, y = (torch.cat(part) for part in zip(*batches(3), strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    learn = Learner(
        DataLoaders(loader, loader, device=torch.device("cpu")),
        Net(),
        loss_func=torch.nn.CrossEntropyLoss(),
        opt_func=lambda params, **options: OptimWrapper(params, torch.optim.SGD, **options),
        path=folder,
        cbs=[Excite()],
    )
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: None
    return learn


def test_a_fit_is_that_of_a_loop_of_ones_own(tmp_path):
    learn = learner(tmp_path)
    plain = Net()
    plain.load_state_dict(learn.model.state_dict())
    learn.fit(2, lr=0.1)
    assert learn.excitation.steps == 6

    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    torch.manual_seed(1)
    ws.attach(plain, optimizer, "lwe+mwe")
    for image, label in [*batches(3), *batches(3)]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(image), label).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(learn.model.state_dict()[name], value)


def test_what_it_saves_is_vanilla_and_has_the_state(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, lr=0.1)
    file = learn.save("last")
    saved = torch.load(file, weights_only=True)
    assert saved["opt"]["state"]["we_surgery"]["steps"] == 3
    Net().load_state_dict(saved["model"])
