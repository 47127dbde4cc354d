"""Families that are known and cannot be right yet, and why."""

from __future__ import annotations

_UNGATED = """apertus arcee bloom codegen falcon gpt2 gpt_bigcode gpt_neo gpt_neox gptj mpt nemotron
opt phi starcoder2"""
_EXPERTS = """afmoe cohere2_moe deepseek_v2 deepseek_v32 dots1 ernie4_5_moe ernie4_5_vl_moe
exaone_moe flex_olmo glm4_moe_lite glm4v_moe glm_moe_dsa granitemoeshared hunyuan_v1_moe jamba
lfm2_moe llama4 llama4_text longcat_flash minimax phimoe qwen3_omni_moe solar_open"""
_OTHER_LOGITS = "aya_vision cohere2_vision"
_STATE = "deepseek_v4 gemma3n gemma3n_text glm5_next qwen4_exp"
_TOWERS = "qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text"
REFUSED: dict[str, str] = {
    **dict.fromkeys(_UNGATED.split(), "its MLPs have no gate"),
    **dict.fromkeys(_EXPERTS.split(), "how it runs its experts is not known yet"),
    **dict.fromkeys(_OTHER_LOGITS.split(), "its logits are not those of its text tower"),
    **dict.fromkeys(_TOWERS.split(), "it is a text tower without a head; give the whole model"),
    **dict.fromkeys(_STATE.split(), "its layers pass on more than one hidden state"),
}
