"""Every way in which an excited weight can change."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

import we_surgery as ws
from we_surgery.converted.layer import WEConv2d
from we_surgery.excitations import LWE, MWE


def excited_conv() -> WEConv2d:
    """A conv on its own with both LWE and MWE, in eval mode."""
    torch.manual_seed(0)
    model = ws.convert(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), "lwe+mwe")
    conv = model.eval()[0]
    assert isinstance(conv, WEConv2d)
    return conv


def write_in_place(conv: WEConv2d) -> None:
    with torch.no_grad():
        conv.raw_weight.mul_(2).add_(0.1)


def write_a_detached_alias(conv: WEConv2d) -> None:
    conv.raw_weight.detach().uniform_()


def write_in_inference_mode(conv: WEConv2d) -> None:
    with torch.inference_mode():
        conv.raw_weight.uniform_()


def assign_data(conv: WEConv2d) -> None:
    conv.raw_weight.data = torch.rand_like(conv.raw_weight)


def assign_data_over_and_over(conv: WEConv2d) -> None:
    # The allocator likes to give out an address again as soon as it is free.
    for _ in range(8):
        conv.raw_weight.data = conv.raw_weight.data * 1.3 + 0.1


def assign_a_parameter(conv: WEConv2d) -> None:
    conv.raw_weight = nn.Parameter(torch.rand_like(conv.raw_weight))


def replace_the_parameter_behind_the_layer(conv: WEConv2d) -> None:
    conv._parameters["raw_weight"] = nn.Parameter(torch.rand_like(conv.raw_weight))


def swap_tensors(conv: WEConv2d) -> None:
    torch.utils.swap_tensors(conv.raw_weight, nn.Parameter(torch.rand_like(conv.raw_weight)))


def load(conv: WEConv2d) -> None:
    conv.load_state_dict({key: value + 0.3 for key, value in conv.state_dict().items()})


def load_by_assignment(conv: WEConv2d) -> None:
    state = {key: value + 0.3 for key, value in conv.state_dict().items()}
    conv.load_state_dict(state, assign=True)


def load_a_vanilla_checkpoint(conv: WEConv2d) -> None:
    conv.load_state_dict({"weight": torch.rand_like(conv.raw_weight)})


def step(conv: WEConv2d) -> None:
    conv(torch.randn(1, 4, 5, 5)).square().sum().backward()
    torch.optim.SGD(conv.parameters(), 0.1).step()
    conv.zero_grad()


def step_all_at_once(conv: WEConv2d) -> None:
    conv(torch.randn(1, 4, 5, 5)).square().sum().backward()
    torch.optim.AdamW(conv.parameters(), 0.1, foreach=True).step()
    conv.zero_grad()


def cast_there_and_back(conv: WEConv2d) -> None:
    conv.half().float()


def cast(conv: WEConv2d) -> None:
    conv.bfloat16()


def change_the_memory_format(conv: WEConv2d) -> None:
    conv.to(memory_format=torch.channels_last)


def write_into_the_location_net(conv: WEConv2d) -> None:
    with torch.no_grad():
        conv.excitation.lwe.fc2.bias.add_(1)


def assign_data_to_the_location_net(conv: WEConv2d) -> None:
    bias = conv.excitation.lwe.fc2.bias
    bias.data = bias.data + 1


def replace_a_parameter_of_the_location_net(conv: WEConv2d) -> None:
    fc2 = conv.excitation.lwe.fc2
    fc2.bias = nn.Parameter(fc2.bias.detach() + 1)


def replace_a_layer_of_the_location_net(conv: WEConv2d) -> None:
    fc2 = conv.excitation.lwe.fc2
    conv.excitation.lwe.fc2 = nn.Linear(fc2.in_features, fc2.out_features)


def replace_the_location_net(conv: WEConv2d) -> None:
    conv.excitation.lwe = LWE(4, reduction=1)


def remove_or_add_a_stage(conv: WEConv2d) -> None:
    if hasattr(conv.excitation, "mwe"):
        del conv.excitation.mwe
    else:
        conv.excitation.add_module("mwe", MWE())


def replace_the_excitation(conv: WEConv2d) -> None:
    other = excited_conv().excitation
    torch.nn.init.ones_(other.lwe.fc2.bias)
    conv.excitation = other


def write_a_hyperparameter(conv: WEConv2d) -> None:
    conv.excitation.mwe.epsilon = 0.5


def parametrize_the_location_net(conv: WEConv2d) -> None:
    fc1 = conv.excitation.lwe.fc1
    if not is_parametrized(fc1):
        parametrizations.weight_norm(fc1)
    with torch.no_grad():
        fc1.parametrizations.weight.original0.mul_(3)


class Stretch(nn.Module):
    """A parametrization whose result no tensor tells."""

    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


def change_what_a_parametrization_does(conv: WEConv2d) -> None:
    fc1 = conv.excitation.lwe.fc1
    if not is_parametrized(fc1):
        register_parametrization(fc1, "weight", Stretch())
    fc1.parametrizations.weight[0].factor += 1


def write_data_and_call_eval(conv: WEConv2d) -> None:
    conv.raw_weight.data.uniform_()
    conv.eval()


def write_data_and_train_in_between(conv: WEConv2d) -> None:
    conv.train()
    conv.raw_weight.data.uniform_()
    conv.eval()


def write_data_after_a_pass_with_gradients(conv: WEConv2d) -> None:
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    for parameter in conv.parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)  # as optimizers were once written


CHANGES: list[Callable[[WEConv2d], None]] = [
    write_in_place,
    write_a_detached_alias,
    write_in_inference_mode,
    assign_data,
    assign_data_over_and_over,
    assign_a_parameter,
    replace_the_parameter_behind_the_layer,
    swap_tensors,
    load,
    load_by_assignment,
    load_a_vanilla_checkpoint,
    step,
    step_all_at_once,
    cast_there_and_back,
    cast,
    change_the_memory_format,
    write_into_the_location_net,
    assign_data_to_the_location_net,
    replace_a_parameter_of_the_location_net,
    replace_a_layer_of_the_location_net,
    replace_the_location_net,
    remove_or_add_a_stage,
    replace_the_excitation,
    write_a_hyperparameter,
    parametrize_the_location_net,
    change_what_a_parametrization_does,
    write_data_and_call_eval,
    write_data_and_train_in_between,
    write_data_after_a_pass_with_gradients,
]
