#include <headfold/folding/folded_layers.h>

#include <exception>

namespace headfold::folding {

NewTensors FoldedLayers::operator()(std::int64_t layer) {
  const std::int64_t ranks = world_.size();
  if (layer % ranks == 0) fold_own(layer + world_.rank());
  if (ranks == 1) return std::move(own_);
  const int owner = static_cast<int>(layer % ranks);
  std::string names;
  if (world_.rank() == owner) {
    OrderedJson shapes;
    for (const auto& [name, tensor] : own_)
      shapes[name] = std::vector<std::int64_t>(tensor.sizes().begin(), tensor.sizes().end());
    names = shapes.dump();
  }
  world_.broadcast(names, owner);
  NewTensors tensors;
  const OrderedJson shapes = OrderedJson::parse(names);
  for (const auto& [name, shape] : shapes.items()) {
    at::Tensor tensor = world_.rank() == owner ? own_.at(name).to(at::kDouble).contiguous()
                                               : at::empty(shape.get<std::vector<std::int64_t>>(), at::kDouble);
    world_.broadcast(
        std::as_writable_bytes(std::span(tensor.data_ptr<double>(), static_cast<std::size_t>(tensor.numel()))), owner);
    tensors[name] = std::move(tensor);
  }
  if (world_.rank() == owner) own_.clear();
  return tensors;
}

void FoldedLayers::fold_own(std::int64_t layer) {
  std::exception_ptr error;
  std::string failure;
  own_.clear();
  if (layer < layers_) {
    try {
      own_ = fold_(layer);
    } catch (const Error& caught) {
      error = std::current_exception();
      failure = caught.what();
    }
  }
  const std::vector<std::string> failures = world_.all_gather(failure);
  if (error) std::rethrow_exception(error);
  for (const std::string& text : failures)
    if (!text.empty()) throw AgreedError(text);
}

}  // namespace headfold::folding
