"""A stage that goes on from an exported folder begins with what was exported."""

import torch

from training.finished import start_of, state_of_folder
from training.flat_vae import volumetric
from training.run import instruct_stage


def test_a_folder_gives_back_what_was_exported(small_stage, tmp_path):
    stage = small_stage()
    stage.step()
    folder = stage.export(tmp_path / "folder")
    state = state_of_folder(folder)
    average = stage.optimiser.average
    assert state["optimiser"]["average"].keys() == average.keys()
    for name, tensor in state["optimiser"]["average"].items():
        exact = average[name] if name.endswith("router.weight") else average[name].to(torch.bfloat16).float()
        assert torch.equal(tensor, exact), name
    assert volumetric(state["vae"]).keys() == volumetric(stage.vae_state).keys()
    assert all(torch.equal(tensor, stage.vae_state[name].float()) for name, tensor in state["vae"].items())
    assert tuple(state["scaling"]) == stage.scaling


def test_the_third_stage_begins_with_it(small_stage, tmp_path):
    first = small_stage()
    folder = first.export(tmp_path / "folder")
    config = first.config
    begun = instruct_stage(config, tmp_path / "none.pt", folder)
    weights = start_of(folder)["optimiser"]["average"]
    assert all(torch.equal(begun.optimiser.masters[name], weights[name]) for name in weights)
