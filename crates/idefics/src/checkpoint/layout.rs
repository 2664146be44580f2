//! Which tensors a configuration calls for: the reference's state-dict keys and their shapes.
//!
//! Source: transformers `modeling_idefics.py`, `vision.py` and `perceiver.py`, the keys of
//! `IdeficsForVisionText2Text`. Surprising: the misspelt `pre_layrnorm` is the real key, and the vision tower's
//! `post_layernorm` is stored but its output is never used.

use std::fmt;

use crate::config::{AlphaType, IdeficsConfig};

/// Additional embedding rows; the file's number of them is compared with the configuration's.
pub(super) const ADDITIONAL_EMBEDDING: &str = "model.embed_tokens.additional_embedding.weight";
/// Additional head rows.
pub(super) const ADDITIONAL_FC: &str = "lm_head.additional_fc.weight";
/// Base embedding.
pub(super) const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// Base head.
pub(super) const LM_HEAD: &str = "lm_head.weight";

/// A part of the model, as `inspect` adds it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// Base and additional token embedding.
    Embedding,
    /// The CLIP tower.
    Vision,
    /// The resampler.
    Perceiver,
    /// The LLaMA layers.
    Decoder,
    /// The gated cross-attention blocks between them.
    GatedCrossAttention,
    /// The norm after the last layer.
    Norm,
    /// Base and additional head.
    Head,
    /// None of these: a key that no part of the model has.
    Unknown,
}

impl Component {
    /// The part that a tensor name belongs to.
    pub fn of(name: &str) -> Self {
        let prefixes = [
            ("model.embed_tokens.", Self::Embedding),
            ("model.vision_model.", Self::Vision),
            ("model.perceiver_resampler.", Self::Perceiver),
            ("model.layers.", Self::Decoder),
            ("model.gated_cross_attn_layers.", Self::GatedCrossAttention),
            ("model.norm.", Self::Norm),
            ("lm_head.", Self::Head),
        ];
        prefixes
            .iter()
            .find(|(prefix, _)| name.starts_with(prefix))
            .map_or(Self::Unknown, |(_, component)| *component)
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedding => "embedding",
            Self::Vision => "vision tower",
            Self::Perceiver => "perceiver",
            Self::Decoder => "decoder",
            Self::GatedCrossAttention => "gated cross-attention",
            Self::Norm => "final norm",
            Self::Head => "head",
            Self::Unknown => "unknown",
        })
    }
}

/// A part of the model whose linear layers may be packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The LLaMA layers.
    Text,
    /// The gated cross-attention blocks.
    Cross,
    /// The CLIP tower.
    Vision,
    /// The resampler.
    Perceiver,
}

impl Part {
    /// Every part.
    pub const ALL: [Self; 4] = [Self::Text, Self::Cross, Self::Vision, Self::Perceiver];

    /// The part of which `name` is the weight of a linear layer. Embeddings, norms, gates, heads and the patch
    /// embedding, a convolution to the reference, belong to none.
    pub fn of_linear(name: &str) -> Option<Self> {
        let part = match Component::of(name) {
            Component::Decoder => Self::Text,
            Component::GatedCrossAttention => Self::Cross,
            Component::Vision => Self::Vision,
            Component::Perceiver => Self::Perceiver,
            _ => return None,
        };
        let layer = name.strip_suffix(".weight")?.rsplit('.').next()?;
        (layer.ends_with("_proj") || matches!(layer, "fc" | "fc1" | "fc2")).then_some(part)
    }

    /// The module of the reference that holds the part.
    pub fn module(self) -> &'static str {
        match self {
            Self::Text => "model.layers",
            Self::Cross => "model.gated_cross_attn_layers",
            Self::Vision => "model.vision_model",
            Self::Perceiver => "model.perceiver_resampler",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Cross => "cross",
            Self::Vision => "vision",
            Self::Perceiver => "perceiver",
        })
    }
}

/// Name and shape of every tensor that the files of such a model have: those of [`expected_tensors`], but no tied heads,
/// which are the embeddings.
pub(crate) fn file_tensors(config: &IdeficsConfig) -> impl Iterator<Item = (String, Vec<usize>)> {
    let is_tied = config.tie_word_embeddings;
    expected_tensors(config).into_iter().filter(move |(name, _)| !(is_tied && name.starts_with("lm_head.")))
}

/// Name and shape of every tensor that a model of this configuration has, the heads included even if they are
/// tied to the embeddings.
pub fn expected_tensors(config: &IdeficsConfig) -> Vec<(String, Vec<usize>)> {
    let mut keys = Keys { list: Vec::new(), prefix: String::new() };
    let (vocab, additional, d) = (config.vocab_size, config.additional_vocab_size, config.hidden_size);

    keys.add(EMBED_TOKENS, &[vocab, d]);
    if additional > 0 {
        keys.add(ADDITIONAL_EMBEDDING, &[additional, d]);
    }
    vision(&mut keys, config);
    if config.use_resampler {
        perceiver(&mut keys, config);
    }
    for n in 0..config.num_hidden_layers {
        keys.within(&format!("model.layers.{n}."), |keys| {
            for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
                keys.add(&format!("self_attn.{name}.weight"), &[d, d]);
            }
            text_mlp_and_norms(keys, config);
        });
    }
    for n in 0..config.num_cross_layers() {
        keys.within(&format!("model.gated_cross_attn_layers.{n}."), |keys| gated_block(keys, config));
    }
    keys.add("model.norm.weight", &[d]);
    keys.add(LM_HEAD, &[vocab, d]);
    if additional > 0 {
        keys.add(ADDITIONAL_FC, &[additional, d]);
    }
    keys.list
}

/// The list under construction, and what the names being added start with.
struct Keys {
    list: Vec<(String, Vec<usize>)>,
    prefix: String,
}

impl Keys {
    fn add(&mut self, name: &str, shape: &[usize]) {
        self.list.push((format!("{}{name}", self.prefix), shape.to_vec()));
    }

    /// Weight and bias of a LayerNorm over `width` values.
    fn layer_norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width]);
        self.add(&format!("{name}.bias"), &[width]);
    }

    /// Weight `[out, in]` and bias `[out]` of a linear layer.
    fn linear_with_bias(&mut self, name: &str, out: usize, width: usize) {
        self.add(&format!("{name}.weight"), &[out, width]);
        self.add(&format!("{name}.bias"), &[out]);
    }

    fn within(&mut self, prefix: &str, add: impl FnOnce(&mut Self)) {
        let length = self.prefix.len();
        self.prefix.push_str(prefix);
        add(self);
        self.prefix.truncate(length);
    }
}

fn vision(keys: &mut Keys, config: &IdeficsConfig) {
    let vision = &config.vision_config;
    let (e, inner) = (vision.embed_dim, vision.intermediate_size);
    keys.within("model.vision_model.", |keys| {
        keys.add("embeddings.class_embedding", &[e]);
        let patch = [e, vision.num_channels, vision.patch_size, vision.patch_size];
        keys.add("embeddings.patch_embedding.weight", &patch);
        keys.add("embeddings.position_embedding.weight", &[vision.num_positions(), e]);
        keys.layer_norm("pre_layrnorm", e);
        for n in 0..vision.num_hidden_layers {
            keys.within(&format!("encoder.layers.{n}."), |keys| {
                for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                    keys.linear_with_bias(&format!("self_attn.{name}"), e, e);
                }
                keys.layer_norm("layer_norm1", e);
                keys.linear_with_bias("mlp.fc1", inner, e);
                keys.linear_with_bias("mlp.fc2", e, inner);
                keys.layer_norm("layer_norm2", e);
            });
        }
        keys.layer_norm("post_layernorm", e);
    });
}

fn perceiver(keys: &mut Keys, config: &IdeficsConfig) {
    let perceiver = &config.perceiver_config;
    let e = config.vision_config.embed_dim;
    let all_heads = perceiver.resampler_n_heads * perceiver.resampler_head_dim;
    // The MLP is four times as wide as the tower, whatever the tower's own MLP is.
    let inner = 4 * e;
    keys.within("model.perceiver_resampler.", |keys| {
        keys.add("latents", &[perceiver.resampler_n_latents, e]);
        for n in 0..perceiver.resampler_depth {
            keys.within(&format!("blocks.{n}.0."), |keys| {
                keys.layer_norm("context_layer_norm", e);
                keys.layer_norm("latents_layer_norm", e);
                if perceiver.qk_layer_norms_perceiver {
                    keys.layer_norm("q_layer_norm", perceiver.resampler_head_dim);
                    keys.layer_norm("k_layer_norm", perceiver.resampler_head_dim);
                }
                for name in ["q_proj", "k_proj", "v_proj"] {
                    keys.add(&format!("{name}.weight"), &[all_heads, e]);
                }
                keys.add("output_proj.weight", &[e, all_heads]);
            });
            keys.within(&format!("blocks.{n}.1."), |keys| {
                keys.layer_norm("ln", e);
                keys.add("fc.weight", &[inner, e]);
                keys.add("c_proj.weight", &[e, inner]);
            });
        }
        keys.layer_norm("layer_norm", e);
    });
}

fn gated_block(keys: &mut Keys, config: &IdeficsConfig) {
    let (d, image_dim) = (config.hidden_size, config.image_dim());
    let alpha: &[usize] = match config.alpha_type {
        AlphaType::Float => &[1],
        AlphaType::Vector => &[1, 1, d],
    };
    keys.add("alpha_cross_attn", alpha);
    keys.add("alpha_dense", alpha);
    keys.add("cross_attn.q_proj.weight", &[d, d]);
    keys.add("cross_attn.k_proj.weight", &[d, image_dim]);
    keys.add("cross_attn.v_proj.weight", &[d, image_dim]);
    keys.add("cross_attn.o_proj.weight", &[d, d]);
    if config.qk_layer_norms {
        keys.add("cross_attn.q_layer_norm.weight", &[config.head_dim()]);
        keys.add("cross_attn.k_layer_norm.weight", &[config.head_dim()]);
    }
    text_mlp_and_norms(keys, config);
}

fn text_mlp_and_norms(keys: &mut Keys, config: &IdeficsConfig) {
    let (d, inner) = (config.hidden_size, config.intermediate_size);
    keys.add("mlp.gate_proj.weight", &[inner, d]);
    keys.add("mlp.up_proj.weight", &[inner, d]);
    keys.add("mlp.down_proj.weight", &[d, inner]);
    keys.add("input_layernorm.weight", &[d]);
    keys.add("post_attention_layernorm.weight", &[d]);
}

/// Whether a loader may pass over a key: buffers that old versions of the reference saved.
pub(super) fn is_ignored(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name == "model.vision_model.embeddings.position_ids"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PerceiverConfig, VisionConfig};

    fn published(layers: usize, d: usize, inner: usize) -> IdeficsConfig {
        IdeficsConfig {
            additional_vocab_size: 2,
            hidden_size: d,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: d / 128,
            cross_layer_interval: 4,
            qk_layer_norms: true,
            use_resampler: true,
            vision_config: VisionConfig { embed_dim: 1280, ..VisionConfig::default() },
            perceiver_config: PerceiverConfig {
                qk_layer_norms_perceiver: true,
                ..PerceiverConfig::default()
            },
            ..IdeficsConfig::default()
        }
    }

    /// Tensors and parameters of each component, in the order of [`Component`].
    fn totals(config: &IdeficsConfig) -> Vec<(usize, u64)> {
        let mut totals = vec![(0, 0); 8];
        for (name, shape) in expected_tensors(config) {
            let total = &mut totals[Component::of(&name) as usize];
            total.0 += 1;
            total.1 += shape.iter().product::<usize>() as u64;
        }
        totals
    }

    #[test]
    fn counts_of_the_9b_model() {
        let config = published(32, 4096, 11008);
        let expected = [
            (2, 131_072_000 + 8_192),
            (519, 630_766_080),
            (99, 125_961_984),
            (288, 6_476_267_520),
            (104, 1_434_519_568),
            (1, 4_096),
            (2, 131_072_000 + 8_192),
            (0, 0),
        ];
        assert_eq!(totals(&config), expected);
        assert_eq!(expected_tensors(&config).len(), 1015);
        assert_eq!(config.num_parameters(), 8_929_679_632);
        let instruct = IdeficsConfig { additional_vocab_size: 3, ..config };
        assert_eq!(instruct.num_parameters(), 8_929_687_824);
    }

    #[test]
    fn counts_of_the_80b_model() {
        let config = published(80, 8192, 22016);
        let expected = [
            (2, 262_144_000 + 16_384),
            (519, 630_766_080),
            (99, 125_961_984),
            (720, 64_761_364_480),
            (260, 13_925_422_120),
            (1, 8_192),
            (2, 262_144_000 + 16_384),
            (0, 0),
        ];
        assert_eq!(totals(&config), expected);
        assert_eq!(expected_tensors(&config).len(), 1603);
        assert_eq!(config.num_parameters(), 79_967_843_624);
    }

    #[test]
    fn optional_parts() {
        let full = published(4, 256, 512);
        let names = |config: &IdeficsConfig| -> Vec<String> {
            expected_tensors(config).into_iter().map(|(name, _)| name).collect()
        };
        assert!(
            names(&full).iter().any(|name| name == "model.perceiver_resampler.blocks.5.0.q_layer_norm.bias")
        );
        let bare = IdeficsConfig {
            use_resampler: false,
            qk_layer_norms: false,
            additional_vocab_size: 0,
            alpha_type: AlphaType::Vector,
            cross_layer_interval: 3,
            ..full
        };
        let names = names(&bare);
        assert!(!names.iter().any(|name| name.contains("perceiver") || name.contains("additional")));
        assert!(!names.iter().any(|name| name.contains("cross_attn.q_layer_norm")));
        assert!(names.iter().any(|name| name == "model.gated_cross_attn_layers.1.alpha_dense"));
        assert!(!names.iter().any(|name| name.starts_with("model.gated_cross_attn_layers.2.")));
        let shapes = expected_tensors(&bare);
        let alpha = shapes.iter().find(|(name, _)| name.ends_with("0.alpha_dense")).unwrap();
        assert_eq!(alpha.1, [1, 1, 256]);
    }

    /// Exactly the modules that are `nn.Linear` in the reference, but for the heads.
    #[test]
    fn linear_layers_of_each_part() {
        let mut counts = [0; 4];
        for (name, shape) in expected_tensors(&published(32, 4096, 11008)) {
            if let Some(part) = Part::of_linear(&name) {
                assert_eq!(shape.len(), 2, "{name}");
                assert!(name.starts_with(part.module()), "{name}");
                counts[part as usize] += 1;
            }
        }
        assert_eq!(counts, [32 * 7, 8 * 7, 32 * 6, 6 * 6]);
        for name in [
            "lm_head.weight",
            "lm_head.additional_fc.weight",
            "model.embed_tokens.weight",
            "model.vision_model.embeddings.patch_embedding.weight",
            "model.vision_model.embeddings.position_embedding.weight",
            "model.vision_model.encoder.layers.0.mlp.fc1.bias",
            "model.layers.0.input_layernorm.weight",
            "model.perceiver_resampler.latents",
        ] {
            assert_eq!(Part::of_linear(name), None, "{name}");
        }
    }

    #[test]
    fn only_old_buffers_are_ignored() {
        assert!(is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq"));
        assert!(is_ignored("model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq"));
        assert!(is_ignored("model.vision_model.embeddings.position_ids"));
        assert!(!is_ignored("model.layers.3.self_attn.q_proj.bias"));
        assert!(!is_ignored("position_ids"));
    }
}
