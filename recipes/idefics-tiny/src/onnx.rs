//! The few fields of ONNX's messages that hold weights.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

/// Weights by name.
pub(crate) struct Weights {
    tensors: HashMap<String, Tensor>,
    /// Which weights a node reads.
    nodes: HashMap<String, Vec<String>>,
}

/// Numbers and their shape.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f32>,
}

impl Weights {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        const FLOAT: i32 = 1;
        let graph = ModelProto::decode(bytes).context("not an ONNX model")?.graph.context("no graph")?;
        let nodes = graph.node.into_iter().map(|node| (node.name, node.input)).collect();
        let mut tensors = HashMap::new();
        for tensor in graph.initializer.into_iter().filter(|tensor| tensor.data_type == FLOAT) {
            let shape: Vec<usize> = tensor.dims.iter().map(|dim| *dim as usize).collect();
            let (numbers, rest) = tensor.raw_data.as_chunks::<4>();
            let expected: usize = shape.iter().product();
            ensure!(
                rest.is_empty() && numbers.len() == expected,
                "{}: expected {expected} numbers, got {}",
                tensor.name,
                numbers.len()
            );
            let data = numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            tensors.insert(tensor.name, Tensor { shape, data });
        }
        Ok(Self { tensors, nodes })
    }

    pub(crate) fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).with_context(|| format!("no weight {name}"))
    }

    /// The weight that a node multiplies by; exporters give these numbers for names.
    pub(crate) fn of_node(&self, node: &str) -> Result<&Tensor> {
        let inputs = self.nodes.get(node).with_context(|| format!("no node {node}"))?;
        inputs
            .iter()
            .find_map(|input| self.tensors.get(input))
            .with_context(|| format!("{node} has no weight"))
    }

    /// The only weight of this shape whose name does not start with `except`.
    pub(crate) fn of_shape(&self, shape: &[usize], except: &str) -> Result<&Tensor> {
        let mut found =
            self.tensors.iter().filter(|(name, tensor)| tensor.shape == shape && !name.starts_with(except));
        let (_, tensor) = found.next().with_context(|| format!("no weight of shape {shape:?}"))?;
        ensure!(found.next().is_none(), "several weights of shape {shape:?}");
        Ok(tensor)
    }
}
