"""The engines that execute a graph: ONNX Runtime on a CPU, TensorRT on a GPU, behind one interface."""
