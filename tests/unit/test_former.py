"""Former names of modules still have what they had."""

import pickle
import sys
from importlib import import_module

import pytest

from timm_halonet import _former
from timm_halonet.families.eamlp.eamlp import EAMLPCfg

NAMES = {
    "attend": "BlockAttention attention_of draw",
    "converting": "STAND_INS WRAPPERS convert read_checkpoint unwrap",
    "inference": "Prediction choose_device classify find_photos label_names load_model open_photo",
    "layers.block_attention": "BlockSelfAttention2d",
    "layers.external_attention": "ExternalAttention ExternalAttention2d double_normalize",
    "layers.focal_attention": "FocalAttention",
    "layers.lesa": "FlattenedRelativePositions HeightWidthRelativePositions LocallyEnhancedSelfAttention",
    "layers.map_attention": "ATTENTIONS MapAttentionEncoder MapAttentionLayer POSITIONS",
    "models.eamlp": "EAMLP EAMLPBlock EAMLPCfg POOLS cfgs checkpoint_filter_fn default_cfgs eamlp_7",
    "models.focal": "FocalBlock FocalCfg FocalTransformer cfgs default_cfgs focal_transformer_tiny",
    "models.focal_checkpoint": "checkpoint_filter_fn",
    "models.lesa": "LesaCfg LesaResNet cfgs checkpoint_filter_fn default_cfgs lesa_resnet50",
    "plotting": "COLORS COLUMNS Run SUMMARY_NAME best read_run scatter",
    "publishing": "Checkpoint FILES STORED_LOGITS TOLERANCE find_checkpoint publish verify write_check",
    "report.files": "cut_name json_text make_folder remove_leftovers whole_file",
    "segmentation": "BackboneEncoder BlockAttentionUNet PlainEncoder UpBlock double_conv",
}


def test_every_former_name_is_here():
    assert NAMES.keys() == _former.FORMER.keys()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_new_module(name, monkeypatch):
    former = f"timm_halonet.{name}"
    monkeypatch.delitem(sys.modules, former, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{former} is now timm_halonet"):
        module = import_module(former)
    now = [import_module(f"timm_halonet.{new}") for new in _former.FORMER[name]]
    for wanted in NAMES[name].split():
        assert any(getattr(module, wanted) is getattr(new, wanted, None) for new in now)
        assert not isinstance(getattr(module, wanted), type(module))  # verify() of the module verify


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_objects_pickled_under_a_former_name():
    written = pickle.dumps(EAMLPCfg, 0).replace(b"timm_halonet.families.eamlp.eamlp", b"timm_halonet.models.eamlp")
    assert b"models.eamlp" in written and pickle.loads(written) is EAMLPCfg


def test_other_names_are_as_unknown_as_before():
    for name in ("timm_halonet.nothing", "timm_halonet.models.attend", "attend"):
        with pytest.raises(ModuleNotFoundError, match=name):
            import_module(name)
