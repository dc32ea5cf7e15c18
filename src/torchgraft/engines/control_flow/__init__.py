"""Data-dependent control flow: source to statements, to a control-flow graph of straight-line networks, to a host."""

from __future__ import annotations

from torchgraft.engines.control_flow.compiled import BACKENDS, Backend, CompiledDynamic, onnx_bytes
from torchgraft.engines.control_flow.graphs import TEST, Flow, Node, computes, network, optimise, signature
from torchgraft.engines.control_flow.host import Host, HostNode, HostProgram, Run, load_host, onnx_session, save_host
from torchgraft.engines.control_flow.liveness import live_variables
from torchgraft.engines.control_flow.lower import Code, Statement, lower
from torchgraft.engines.control_flow.specialise import specialise

__all__ = [
    "BACKENDS",
    "TEST",
    "Backend",
    "Code",
    "CompiledDynamic",
    "Flow",
    "Host",
    "HostNode",
    "HostProgram",
    "Node",
    "Run",
    "Statement",
    "computes",
    "live_variables",
    "load_host",
    "lower",
    "network",
    "onnx_bytes",
    "onnx_session",
    "optimise",
    "save_host",
    "signature",
    "specialise",
]
