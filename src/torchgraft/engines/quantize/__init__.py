"""Few bits: packed codes on bent grids, networks on integers alone, products by additions, norms without squares.

:mod:`~torchgraft.engines.quantize.fewbit` stores weights, :mod:`~torchgraft.engines.quantize.integers` executes chains
of layers on integers, :mod:`~torchgraft.engines.quantize.additive` emulates products that are made by one addition, and
:mod:`~torchgraft.engines.quantize.l1_norms` holds norms by mean magnitudes. int8 that is executed fast is
:mod:`torchgraft.engines.int8`; codes by bucket are :mod:`torchgraft.engines.bucketed`.
"""
