"""Recipes in the forms in which SparseML and llm-compressor have them, and command lines of the same runs."""

ALTERNATING = r"""
first_sparsity_stage:
  run_type: oneshot
  obcq_modifiers:
    SparseGPTModifier: {sparsity: 0.5, block_size: 128, sequential_update: false, percdamp: 0.01,
      mask_structure: "0:0", targets: ["re:model.layers.\\d+$"]}
first_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: __ALL__, start: 0}
second_sparsity_stage:
  run_type: oneshot
  modifiers:
    SparseGPTModifier: {sparsity: 0.75, targets: [Linear], ignore: ["re:.*lm_head"]}
second_training_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: __ALL__, start: 0}
"""

QUANTIZATION = """
quantization_stage:
  run_type: oneshot
  quantization_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.6
      mappings:
      - - ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']
        - re:.*input_layernorm
      - - ['re:.*gate_proj', 're:.*up_proj']
        - re:.*post_attention_layernorm
    GPTQModifier:
      ignore: [lm_head]
      dampening_frac: 0.01
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel, observer: minmax}
          input_activations: {num_bits: 8, type: int, symmetric: true, dynamic: true, strategy: token}
          output_activations: null
"""

# name: (the file's ending, its text, the command lines)
RECIPES: dict[str, tuple[str, str, list[str]]] = {
    "SparseGPT of SparseML": (
        "yaml",
        r"""
test_stage:
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.6
      block_size: 64
      sequential_update: true
      quantize: false
      percdamp: 0.02
      prunen: 0
      prunem: 0
      targets: ["re:model.layers.\\d*$"]
      target_ids: [attention_mask, position_ids]
""",
        [
            "gossamer prune MODEL -o OUT --sparsity 0.6 --method sparsegpt --block-size 64 "
            "--dampening-frac 0.02 --dataset TEXT"
        ],
    ),
    "W8A8 of llm-compressor": (
        "yaml",
        QUANTIZATION,
        ["gossamer quantize MODEL -o OUT --smoothing-strength 0.6 --dataset TEXT"],
    ),
    "pruned and trained in two steps": (
        "yml",
        ALTERNATING + QUANTIZATION,
        [
            "gossamer compress MODEL -o OUT --sparsity 0.75 --dataset TEXT --pretrain-dataset TRAINING_TEXT "
            "--method sparsegpt --smoothing-strength 0.6"
        ],
    ),
    "trained but not quantized": (
        "yaml",
        ALTERNATING,
        [
            "gossamer prune MODEL -o OUT/1-prune --sparsity 0.5 --method sparsegpt --dataset TEXT",
            "gossamer pretrain OUT/1-prune -o OUT/2-pretrain --dataset TRAINING_TEXT",
            "gossamer prune OUT/2-pretrain -o OUT/3-prune --sparsity 0.75 --method sparsegpt --dataset TEXT",
            "gossamer pretrain OUT/3-prune -o OUT/4-pretrain --dataset TRAINING_TEXT",
        ],
    ),
    "SquareHead": (
        "yaml",
        r"""
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.6}
finetuning_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight', 're:.*k_proj.weight', 're:.*v_proj.weight', 're:.*o_proj.weight',
        're:.*gate_proj.weight', 're:.*up_proj.weight', 're:.*down_proj.weight']
      start: 0
  distillation_modifiers:
    OutputDistillationModifier:
      targets: [model.embed_tokens, 're:model.layers.\d+$']
      comparison: square_head
      start: 0
      orig_scale: 1.0
      distill_scale: 1.0
quantization_stage:
  quantization_modifiers:
    GPTQModifier: {scheme: {W8A8: [Linear]}, ignore: [lm_head], sequential_update: false}
""",
        [
            "gossamer compress MODEL -o OUT --sparsity 0.6 --dataset TEXT --finetune-dataset "
            "EXAMPLES --method sparsegpt"
        ],
    ),
    "card of older SparseML": (
        "md",
        """<!--
Apache License
-->
---
# epochs and rate
num_epochs: 3
half: eval(num_epochs / 2)
init_lr: 1e-4
training_modifiers:
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: eval(half * 2)
  - !LearningRateFunctionModifier
    start_epoch: 0
    end_epoch: eval(num_epochs)
    lr_func: cosine
    init_lr: eval(init_lr)
    final_lr: 0
pruning_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
---
# Fine-tune a sparse model
""",
        [
            "gossamer finetune MODEL -o OUT --distill none --num-train-epochs 3 --learning-rate 0.0001 "
            "--warmup-ratio 0.0 --lr-schedule cosine --dataset EXAMPLES"
        ],
    ),
    "written by llm-compressor beside a model": (
        "yaml",
        """
default_stage:
  default_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.8
      mappings: []
      ignore: []
      num_calibration_steps: null
    GPTQModifier:
      targets: [Linear]
      ignore: [lm_head, 're:.*layers\\.[0-2]\\.mlp\\.down_proj$', model.layers.4.self_attn, LlamaRMSNorm]
      scheme: W8A8
      block_size: 128
      dampening_frac: 0.01
      actorder: static
      offload_hessians: false
""",
        [
            "gossamer quantize MODEL -o OUT --smoothing-strength 0.8 "
            "--ignore '*layers.[0-2].mlp.down_proj' 'model.layers.4.self_attn.*' --dataset TEXT"
        ],
    ),
    "magnitude, with variables of a stage": (
        "yaml",
        """
args: {target: 0.9}
prune_stage:
  run_type: oneshot
  less: 0.4
  pruning_modifiers:
    MagnitudePruningModifier:
      init_sparsity: 0.0
      final_sparsity: eval(target - less)
      update_scheduler: cubic
      start: 0
      end: 1
      targets: __ALL_PRUNABLE__
""",
        ["gossamer prune MODEL -o OUT --sparsity 0.5 --method magnitude --dataset TEXT"],
    ),
    "another damping for each": (
        "yaml",
        """
stages:
  sparse:
    - modifiers: [{SparseGPTModifier: {sparsity: 0.5, dampening_frac: 0.1}}]
  quant:
    - modifiers: [{GPTQModifier: {scheme: int8, dampening_frac: 0.01}}]
""",
        [
            "gossamer prune MODEL -o OUT/1-prune --sparsity 0.5 --method sparsegpt --dampening-frac "
            "0.1 --dataset TEXT",
            "gossamer quantize OUT/1-prune -o OUT/2-quantize --dataset TEXT",
        ],
    ),
    "one damping for both": (
        "yaml",
        """
- SparseGPTModifier: {sparsity: 0.5, dampening_frac: 0.1}
- GPTQModifier: {scheme: W8A8, dampening_frac: 0.1}
""",
        [
            "gossamer compress MODEL -o OUT --sparsity 0.5 --dataset TEXT --method sparsegpt "
            "--dampening-frac 0.1"
        ],
    ),
    "rounded to nearest, zeros held": (
        "yaml",
        """
DEFAULT_stage:
  DEFAULT_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: unstructured, targets: [LlamaDecoderLayer]}
    QuantizationModifier:
      config_groups:
        group_0:
          targets: ['re:.*self_attn.*_proj']
          weights: {num_bits: 8, strategy: channel}
          input_activations: {num_bits: 8, strategy: token, dynamic: true}
        group_1:
          targets: ['re:.*mlp.*_proj']
          weights: {num_bits: 8, strategy: channel}
          input_activations: {num_bits: 8, strategy: token, dynamic: true}
      ignore: [lm_head]
    ConstantPruningModifier: {targets: ['re:.*_proj.weight'], start: 0}
""",
        ["gossamer compress MODEL -o OUT --sparsity 0.5 --dataset TEXT --method sparsegpt"],
    ),
    "OBCQ, rounding inside": (
        "yaml",
        """
obcq_modifiers:
  SmoothQuantModifier: {alpha: 0.8}
  SparseGPTModifier:
    sparsity: 0.7
    quantize: {QuantizationModifier: {scheme: W8A8, ignore: [SiLUActivation, LlamaRotaryEmbedding]}}
""",
        [
            "gossamer compress MODEL -o OUT --sparsity 0.7 --dataset TEXT --method sparsegpt "
            "--smoothing-strength 0.8"
        ],
    ),
    "2:4 of SparseGPT": (
        "yaml",
        """
sparsity_stage:
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: "2:4", targets: [Linear], ignore: ["re:.*lm_head"]}
""",
        ["gossamer prune MODEL -o OUT --sparsity 0.5 --pattern 2:4 --method sparsegpt --dataset TEXT"],
    ),
    "pattern without quotes, which says how many are zeros": (
        "yaml",
        "p_modifiers: {SparseGPTModifier: {sparsity: 0.25, mask_structure: 1:4}}",
        ["gossamer prune MODEL -o OUT --sparsity 0.25 --pattern 3:4 --method sparsegpt --dataset TEXT"],
    ),
    "pattern of older files": (
        "yaml",
        "p_modifiers: {SparseGPTModifier: {sparsity: 0.5, prunen: 4, prunem: 8}}",
        ["gossamer prune MODEL -o OUT --sparsity 0.5 --pattern 4:8 --method sparsegpt --dataset TEXT"],
    ),
    "a pattern, whose share of zeros counts, trained and quantized": (
        "yaml",
        """
sparse_stage: {p_modifiers: {WandaPruningModifier: {sparsity: 0.5, mask_structure: "48:64"}}}
train_stage: {run_type: train, p_modifiers: {ConstantPruningModifier: {targets: __ALL__, start: 0}}}
quant_stage: {q_modifiers: {GPTQModifier: {scheme: W8A8}}}
""",
        [
            "gossamer compress MODEL -o OUT --sparsity 0.75 --dataset TEXT --pretrain-dataset TRAINING_TEXT "
            "--method wanda --pattern 16:64"
        ],
    ),
    "Wanda": (
        "yaml",
        """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    WandaPruningModifier:
      sparsity: 0.6
      mask_structure: '0:0'
      targets: [Linear]
      sequential_update: true
      sequential_targets: null
""",
        ["gossamer prune MODEL -o OUT --sparsity 0.6 --method wanda --dataset TEXT"],
    ),
    "OWL": (
        "yaml",
        "p_modifiers: {SparseGPTModifier: {sparsity: 0.7, sparsity_profile: owl, owl_m: 7, owl_lmbda: 0.1}}",
        [
            "gossamer prune MODEL -o OUT --sparsity 0.7 --sparsity-profile owl --owl-m 7.0 --owl-lambda 0.1 "
            "--method sparsegpt --dataset TEXT"
        ],
    ),
    "OWL with Wanda, as in its paper": (
        "yaml",
        """
p_modifiers:
  WandaPruningModifier: {sparsity: 0.7, sparsity_profile: owl, owl_m: 5, owl_lmbda: 0.08}
""",
        ["gossamer prune MODEL -o OUT --sparsity 0.7 --sparsity-profile owl --method wanda --dataset TEXT"],
    ),
}

_SPARSE = "m_stage: {obcq_modifiers: {SparseGPTModifier: {sparsity: 0.5, %s}}}"
_GPTQ = "m_stage: {quant_modifiers: {GPTQModifier: {%s}}}"
_GROUP = "config_groups: {g: {targets: [Linear], weights: {%s}, input_activations: {%s}}}"
_INPUTS = "num_bits: 8, strategy: token, dynamic: true"

# name: (the file's text, words of the message)
REFUSED: dict[str, tuple[str, str]] = {
    "all of a group": (_SPARSE % 'mask_structure: "4:4"', "mask_structure is '4:4'; supported: '0:0'"),
    "blocks": (_SPARSE % "mask_structure: block", "mask_structure is 'block'; supported: '0:0'"),
    "half a pattern": (_SPARSE % "prunen: 2", "prunen, prunem is '2:None'; supported: '0:0'"),
    "two patterns": (_SPARSE % 'mask_structure: "2:4", prunen: 4, prunem: 8', "say the same; keep one"),
    "OWL without its profile": (_SPARSE % "owl_m: 5, owl_lmbda: 0.08", "owl_m is 5; supported: beside"),
    "OWL and a pattern": (
        _SPARSE % 'sparsity_profile: owl, mask_structure: "2:4"',
        "sparsity_profile is 'owl'; supported: owl, and no pattern",
    ),
    "another profile": (_SPARSE % "sparsity_profile: bell", "sparsity_profile is 'bell'; supported: owl"),
    "sparsity by layer": (
        "pruning_modifiers: {SparseGPTModifier: {sparsity: [0.5, 0.6]}}",
        "sparsity is [0.5, 0.6]; supported: one number",
    ),
    "some layers": (_SPARSE % "targets: [model.layers.0, model.layers.1]", "supported: all linears"),
    "some linears": (
        _SPARSE % "targets: ['re:.*mlp.*']",
        "targets is ['re:.*mlp.*']; supported: all linears",
    ),
    "layers left dense": (_SPARSE % "ignore: ['re:.*down_proj']", "ignore is 're:.*down_proj'"),
    "no sparsity": ("pruning_modifiers: {SparseGPTModifier: {}}", "has no sparsity"),
    "unknown field": (_SPARSE % "blocksize: 128", "SparseGPTModifier.blocksize is 128; this field is not"),
    "a field that Wanda does not have": (
        "pruning_modifiers: {WandaPruningModifier: {sparsity: 0.5, block_size: 128}}",
        "WandaPruningModifier.block_size is 128; this field is not",
    ),
    "AWQ": (
        _GPTQ.replace("GPTQ", "AWQ") % "scheme: W4A16",
        "found AWQModifier; supported: SparseGPTModifier",
    ),
    "four bits": (_GPTQ % "scheme: W4A16", "scheme is 'W4A16'; supported: W8A8"),
    "four bits in full": (
        _GPTQ % (_GROUP % ("num_bits: 4, strategy: group, group_size: 128", _INPUTS)),
        "weights.num_bits = 4",
    ),
    "one scale a matrix": (_GPTQ % (_GROUP % ("num_bits: 8", _INPUTS)), "weights.strategy = None"),
    "static inputs": (
        _GPTQ % (_GROUP % ("num_bits: 8, strategy: channel", "num_bits: 8, strategy: tensor")),
        "input_activations.strategy = 'tensor'",
    ),
    "some linears quantized": (_GPTQ % "scheme: {W8A8: ['re:.*mlp.*']}", "scheme is ['re:.*mlp.*']"),
    "cache of keys and values": (_GPTQ % "scheme: W8A8, kv_cache_scheme: {num_bits: 8}", "kv_cache_scheme"),
    "an exception that no shell pattern says": (
        _GPTQ % r"scheme: W8A8, ignore: ['re:.*layers\.(1|3)\.mlp\.up_proj']",
        "supported: names, and regular expressions of letters",
    ),
    "SparseML's own scheme": (
        "quant_modifiers: {QuantizationModifier: {ignore: [SiLU]}}",
        "without scheme or config_groups",
    ),
    "scheme overrides": (
        "quant_modifiers: {QuantizationModifier: {scheme_overrides: {Embedding: {weights: null}}}}",
        "scheme_overrides is {'Embedding'",
    ),
    "smoothing alone": ("quant_modifiers: {SmoothQuantModifier: {alpha: 0.5}}", "without scheme"),
    "another smoothing": (
        "q_modifiers: {SmoothQuantModifier: {mappings: [[['re:.*o_proj'], 're:.*v_proj']]}}",
        "mappings is [['re:.*o_proj'], 're:.*v_proj']",
    ),
    "pruned after quantization": (
        "a_stage: {q_modifiers: {GPTQModifier: {scheme: W8A8}}}\n"
        "b_stage: {p_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}",
        "SparseGPTModifier comes after a stage that quantizes",
    ),
    "gradual": (
        "m_modifiers: {MagnitudePruningModifier: {init_sparsity: 0.05, final_sparsity: 0.8}}",
        "init_sparsity is 0.05; supported: pruning in one step",
    ),
    "gradual, of older SparseML": (
        "m_modifiers:\n- !GMPruningModifier\n  init_sparsity: 0.05\n  final_sparsity: 0.8\n",
        "init_sparsity is 0.05; supported: pruning in one step",
    ),
    "over all matrices": (
        "p_modifiers: {MagnitudePruningModifier: {final_sparsity: 0.8, apply_globally: true}}",
        "apply_globally is True",
    ),
    "another distillation": (
        "d_modifiers: {OutputDistillationModifier: {targets: ['re:model.layers.\\d+$']}}",
        "comparison is 'kl_divergence'; supported: square_head",
    ),
    "distillation of some layers": (
        "d_modifiers: {OutputDistillationModifier: {targets: [model.layers.0], comparison: square_head}}",
        "targets is ['model.layers.0']; supported: all linears",
    ),
    "zeros held for a while": (
        "p_modifiers: {ConstantPruningModifier: {targets: __ALL__, start: 0, end: 5}}",
        "end is 5; supported: to the end",
    ),
    "part of an epoch": (
        "modifiers: [!EpochRangeModifier {start_epoch: 0, end_epoch: 2.5}]",
        "end_epoch is 2.5; supported: one whole number",
    ),
    "rate that does not fall to 0": (
        "modifiers: [!LearningRateFunctionModifier {init_lr: 0.1, final_lr: 0.01, lr_func: linear}]",
        "final_lr is 0.01; supported: 0",
    ),
    "rate that is constant": (
        "modifiers: [!SetLearningRateModifier {learning_rate: 0.1}]",
        "found SetLearningRateModifier",
    ),
    "code in eval": (_SPARSE % "block_size: eval(__import__('os').getpid())", "found eval(__import__"),
    "eval inside a text": (_SPARSE % "targets: 're:eval(x)'", "eval(...) as the whole of a value"),
    "Python objects": (_SPARSE % "block_size: !!python/object/apply:os.getpid []", "without Python objects"),
    "unknown variable": (_SPARSE % "block_size: eval(width)", "found no variable width"),
    "variables in a circle": ("a: eval(b)\nb: eval(a)\n" + _SPARSE % "block_size: eval(a)", "in a circle"),
    "division by zero": (_SPARSE % "block_size: eval(1 / 0)", "cannot be worked out"),
    "not an expression": (_SPARSE % "block_size: eval(1 +)", "cannot be worked out"),
    "itself inside": (
        "m_modifiers: {SparseGPTModifier: &a {sparsity: 0.5, targets: *a}}",
        "nested too deeply",
    ),
    "a field twice": ("m_modifiers: {SparseGPTModifier: {sparsity: 0.5, sparsity: 0.7}}", "sparsity twice"),
    "a field by both names": (_SPARSE % "percdamp: 0.1, dampening_frac: 0.1", "say the same"),
    "no regular expression": (_SPARSE % "targets: ['re:[']", "no regular expression"),
    "no text": (_SPARSE % "targets: [3]", "names of modules or classes"),
    "no number": ("m_modifiers: {SparseGPTModifier: {sparsity: much}}", "sparsity is 'much'; supported: one"),
    "group misnamed": (
        "m_stage: {obcq: {SparseGPTModifier: {sparsity: 0.5}}}",
        "names of stages end in _stage",
    ),
    "no fields": ("m_modifiers: {SparseGPTModifier: 0.5}", "expected its fields by name"),
    "no modifier": ("version: 1.1.0\nnum_epochs: 3\n", "found no modifier"),
    "nothing": ("", "found NoneType"),
    "no YAML": ("{", "not plain YAML"),
    "a date that is none": ("day: 2024-13-45\n", "not plain YAML"),
    "deep": ("[" * 5000, "not plain YAML"),
}
