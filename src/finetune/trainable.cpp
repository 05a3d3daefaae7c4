#include <ATen/Parallel.h>
#include <headfold/base/error.h>
#include <headfold/finetune/trainable.h>
#include <headfold/model/compute.h>
#include <headfold/model/model.h>
#include <headfold/model/product.h>

#include "layer.h"
#include "loss.h"
#include "tensors.h"

namespace headfold::finetune {
namespace {

using checkpoint::Family;

void check_batch(const Batch& batch, const checkpoint::ModelConfig& config) {
  model::check_ids(batch.ids, config);
  for (const auto& [tensor, what] : {std::pair(&batch.targets, "targets"), std::pair(&batch.segments, "segments")}) {
    if (!tensor->defined() && tensor == &batch.segments) continue;
    if (!tensor->defined() || tensor->scalar_type() != at::kLong || tensor->sizes() != batch.ids.sizes())
      throw InputError(fmt::format("{} are {} [{}], expected int64 [{}] as the token ids", what,
                                   tensor->defined() ? c10::toString(tensor->scalar_type()) : "none",
                                   tensor->defined() ? fmt::format("{}", fmt::join(tensor->sizes(), ", ")) : "",
                                   fmt::join(batch.ids.sizes(), ", ")));
  }
  if (batch.targets.numel() > 0 && batch.targets.max().item<std::int64_t>() >= config.vocab)
    throw InputError(fmt::format("target {} is outside the vocabulary of {} ({} entries)",
                                 batch.targets.max().item<std::int64_t>(), config.file, config.vocab));
  if (batch.numbers.defined() && (batch.numbers.scalar_type() != at::kLong || batch.numbers.dim() != 1 ||
                                  batch.numbers.size(0) != batch.ids.size(0)))
    throw InputError(fmt::format("numbers of sequences are [{}], expected int64 [{}]",
                                 fmt::join(batch.numbers.sizes(), ", "), batch.ids.size(0)));
}

std::vector<std::int64_t> to_vector(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return {dense.data_ptr<std::int64_t>(), dense.data_ptr<std::int64_t>() + dense.numel()};
}

/// Number of the first token of every token's segment.
std::vector<std::int64_t> segment_begins(const Batch& batch) {
  const std::int64_t tokens = batch.ids.size(1);
  std::vector<std::int64_t> begins(static_cast<std::size_t>(batch.ids.numel()), 0);
  if (!batch.segments.defined()) return begins;
  const std::vector<std::int64_t> segments = to_vector(batch.segments);
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const auto token = static_cast<std::int64_t>(i) % tokens;
    if (token > 0) begins[i] = segments[i] == segments[i - 1] ? begins[i - 1] : token;
  }
  return begins;
}

}  // namespace

struct TrainableModel::State {
  checkpoint::Reader reader;
  checkpoint::ModelConfig config;
  LoraOptions options;
  at::ScalarType dtype;
  std::vector<Parameter> parameters;
  Weight embedding;
  Norm embedding_norm;
  std::vector<TrainableLayer> layers;
  Norm norm;
  Weight head;  // the embedding's parameter where they are tied
  at::Tensor inverse_frequencies;
  bool checkpointing = true;

  State(const checkpoint::Reader& source, const LoraOptions& wanted, at::ScalarType compute)
      : reader(source), config(source.config()), options(wanted), dtype(compute) {
    if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kDouble)
      throw UsageError(fmt::format("models train in float32 or bfloat16, not {}", c10::toString(dtype)));
    if (!(options.dropout >= 0 && options.dropout <= 0.95))
      throw UsageError(fmt::format("dropout of {}: choose 0 to 0.95", options.dropout));
    if (options.rank < 1 && !options.full) throw UsageError(fmt::format("adapters of rank {}", options.rank));
    Loader loader(reader, options, dtype, parameters);
    const bool bloom = config.family == Family::bloom;
    const std::string prefix = checkpoint::tensor_prefix(config.family);
    const std::string table = prefix + (bloom ? "word_embeddings.weight" : "embed_tokens.weight");
    embedding = loader.weight(table, {config.vocab, config.hidden}, -1);
    if (bloom) embedding_norm = loader.norm(prefix + "word_embeddings_layernorm", config.hidden, true, -1);
    layers.reserve(static_cast<std::size_t>(config.layers));
    for (std::int64_t layer = 0; layer < config.layers; ++layer) layers.emplace_back(loader, layer);
    norm = loader.norm(prefix + (bloom ? "ln_f" : "norm"), config.hidden, bloom, config.layers);
    head = config.tied_embeddings ? embedding
                                  : loader.weight("lm_head.weight", {config.vocab, config.hidden}, config.layers);
    if (!bloom) inverse_frequencies = model::rope_inverse_frequencies(config);
  }

  Pass pass_of(const Batch& batch, bool training, std::uint64_t dropout_seed) {
    Pass pass = bare_pass();
    pass.dropout = training ? options.dropout : 0;
    pass.dropout_seed = dropout_seed;
    pass.batch = batch.ids.size(0);
    pass.tokens = batch.ids.size(1);
    if (batch.numbers.defined()) {
      pass.numbers = to_vector(batch.numbers);
    } else {
      for (std::int64_t i = 0; i < pass.batch; ++i) pass.numbers.push_back(i);
    }
    pass.segment_begin = segment_begins(batch);
    if (inverse_frequencies.defined()) {
      // As the decoder does: angles, cos and sin in float32, then the compute dtype's rounding.
      const at::Tensor angles = at::outer(at::arange(pass.tokens, at::kFloat), inverse_frequencies.to(at::kFloat));
      pass.rotation.cosine = at::cos(angles).to(dtype).to(at::kFloat).to(model::compute().device);
      pass.rotation.sine = at::sin(angles).to(dtype).to(at::kFloat).to(model::compute().device);
      for (std::size_t i = 0; i < pass.segment_begin.size(); ++i)
        pass.rotation.positions.push_back(static_cast<std::int64_t>(i) % pass.tokens - pass.segment_begin[i]);
    }
    return pass;
  }

  Pass bare_pass() {
    Pass pass;
    pass.parameters = &parameters;
    pass.dtype = dtype;
    pass.lora_scale = options.scale();
    if (tensors::in_use()) {
      pass.on_device = std::make_shared<Pass::OnDevice>();
      pass.on_device->values.resize(parameters.size());
      pass.on_device->gradients.resize(parameters.size());
    }
    return pass;
  }

  at::Tensor embed_rows(const Pass& pass, const Batch& batch) const {
    // A trained table is not rounded as a whole for the few rows of a batch.
    const at::Tensor table = embedding.parameter < 0
                                 ? embedding.frozen
                                 : (*pass.parameters)[static_cast<std::size_t>(embedding.parameter)].value;
    return at::index_select(table, 0, batch.ids.reshape({-1}).to(table.device())).to(dtype).to(model::compute().device);
  }

  at::Tensor embed(const Pass& pass, const Batch& batch) const {
    at::Tensor rows = embed_rows(pass, batch);
    if (!embedding_norm.weight.defined()) return rows;
    return normalise(rows, pass.value(embedding_norm.weight), pass.value(embedding_norm.bias), config.norm_eps);
  }

  void embed_backward(const Pass& pass, const Batch& batch, at::Tensor dx) const {
    at::Tensor gradient = pass.gradient(embedding);
    if (!gradient.defined()) return;
    if (embedding_norm.weight.defined()) {
      const at::Tensor drows = at::zeros_like(dx);
      normalise_backward(embed_rows(pass, batch), pass.value(embedding_norm.weight), pass.value(embedding_norm.bias),
                         config.norm_eps, dx, drows, pass.gradient(embedding_norm.weight),
                         pass.gradient(embedding_norm.bias));
      dx = drows;
    }
    gradient.index_add_(0, batch.ids.reshape({-1}).to(gradient.device()), dx.to(gradient.scalar_type()));
  }

  at::Tensor final_norm(const Pass& pass, const at::Tensor& x) const {
    return normalise(x, pass.value(norm.weight), norm.bias.defined() ? pass.value(norm.bias) : at::Tensor(),
                     config.norm_eps);
  }

  /// Logits [rows, vocab] of normed rows, float32 (float64), into `out`.
  void project_logits(const at::Tensor& normed, const at::Tensor& table, const at::Tensor& out) const {
    if (tensors::in_use()) {
      tensors::product(normed, table, model::Operation{.transpose_b = true}, out);
      return;
    }
    model::multiply({normed.data_ptr(), normed.size(0), normed.size(1), normed.size(1)},
                    {table.data_ptr(), table.size(0), table.size(1), table.size(1)},
                    model::Operation{.transpose_b = true}, dtype, out.data_ptr(), out.size(1), out.scalar_type());
  }

  TeacherRows teacher_rows(const TeacherView* teacher, std::int64_t begin, std::int64_t end) const {
    TeacherRows rows;
    if (teacher == nullptr) return rows;
    if (teacher->logits) {
      rows.logits = teacher->logits(begin, end).to(parameter_type(dtype)).contiguous();
      if (rows.logits.dim() != 2 || rows.logits.size(0) != end - begin || rows.logits.size(1) != config.vocab)
        throw InputError(fmt::format("the teacher gave logits [{}] for {} positions of a vocabulary of {}",
                                     fmt::join(rows.logits.sizes(), ", "), end - begin, config.vocab),
                         "teacher and student need the same tokenizer");
      // The divergence leaves NaN out; without this the student's training data would be blamed.
      if (at::isnan(rows.logits).any().item<bool>())
        throw NumericalError("the teacher gives NaN",
                             "try --dtype float32; if it persists, the teacher's checkpoint is broken");
    } else {
      rows.top_log_probs = teacher->top_log_probs.slice(0, begin, end).to(at::kDouble).contiguous();
      rows.top_tokens = teacher->top_tokens.slice(0, begin, end).to(at::kLong).contiguous();
    }
    return rows;
  }

  void check_teacher(const TeacherView* teacher, const LossOptions& loss, std::int64_t positions) const {
    if (!(loss.distill_weight >= 0 && loss.distill_weight <= 1) || !(loss.temperature > 0))
      throw UsageError(
          fmt::format("distillation with weight {} and temperature {}: weights are 0 to 1, temperatures "
                      "positive",
                      loss.distill_weight, loss.temperature));
    if (teacher == nullptr) {
      if (loss.distill_weight > 0) throw InternalError("distillation without a teacher");
      return;
    }
    if (teacher->logits) return;
    const at::Tensor& p = teacher->top_log_probs;
    const at::Tensor& t = teacher->top_tokens;
    if (!p.defined() || !t.defined() || p.dim() != 2 || p.sizes() != t.sizes() || p.size(0) != positions ||
        p.size(1) < 1)
      throw InputError(
          fmt::format("the teacher's log-probabilities are [{}] and its tokens [{}], expected [{}, k] each",
                      p.defined() ? fmt::format("{}", fmt::join(p.sizes(), ", ")) : "",
                      t.defined() ? fmt::format("{}", fmt::join(t.sizes(), ", ")) : "", positions));
    if (loss.temperature != 1)
      throw UsageError(fmt::format("temperature {} with the teacher's most probable tokens only", loss.temperature),
                       "these were made at temperature 1: use 1, or the teacher itself");
  }

  /// Loss over the scored rows of x [rows, hidden]; with `gradient` gives that with respect to x in it and adds that of
  /// the final norm and the output projection.
  LossSums head_loss(const Pass& pass, const at::Tensor& x, const Batch& batch, const TeacherView* teacher,
                     const LossOptions& loss, double scale, at::Tensor* gradient) {
    const at::Tensor flat = batch.targets.reshape({-1});
    const at::Tensor scored = at::nonzero(flat.ge(0)).view({-1});
    const std::int64_t positions = scored.size(0);
    check_teacher(teacher, loss, positions);
    if (gradient != nullptr) *gradient = at::zeros_like(x);
    LossSums sums;
    if (positions == 0) return sums;
    const at::Tensor table = pass.value(head);
    const std::int64_t rows = logit_chunk_rows(config.vocab, dtype, positions);
    const auto wide = x.options().dtype(parameter_type(dtype));
    const at::Tensor buffer = at::empty({std::min(rows, positions), config.vocab}, wide);
    const at::Tensor norm_weight = pass.value(norm.weight);
    const at::Tensor norm_bias = norm.bias.defined() ? pass.value(norm.bias) : at::Tensor();
    for (std::int64_t begin = 0; begin < positions; begin += rows) {
      const std::int64_t end = std::min(positions, begin + rows);
      const at::Tensor index = scored.slice(0, begin, end).to(x.device());
      const at::Tensor own = x.index_select(0, index);
      const at::Tensor normed = normalise(own, norm_weight, norm_bias, config.norm_eps);
      const at::Tensor logits = buffer.slice(0, 0, end - begin);
      project_logits(normed, table, logits);
      const LossSums part = loss_of_rows(logits, flat.index_select(0, scored.slice(0, begin, end)),
                                         teacher_rows(teacher, begin, end), loss, scale, gradient != nullptr);
      sums += part;
      if (gradient == nullptr) continue;
      const at::Tensor dlogits = logits.to(dtype);
      const at::Tensor dnormed = at::empty_like(normed);
      const at::Tensor dtable = pass.gradient(head);
      const model::Operation outer{.transpose_a = true, .accumulate = true};
      if (tensors::in_use()) {
        tensors::product(dlogits, table, {}, dnormed);
        if (dtable.defined()) tensors::product(dlogits, normed, outer, dtable);
      } else {
        const model::Matrix d{dlogits.data_ptr(), end - begin, config.vocab, config.vocab};
        model::multiply(d, {table.data_ptr(), config.vocab, config.hidden, config.hidden}, model::Operation{}, dtype,
                        dnormed.data_ptr(), config.hidden, dtype);
        if (dtable.defined())
          model::multiply(d, {normed.data_ptr(), end - begin, config.hidden, config.hidden}, outer, dtype,
                          dtable.data_ptr(), config.hidden, dtable.scalar_type());
      }
      const at::Tensor dx = at::zeros_like(own);
      normalise_backward(own, norm_weight, norm_bias, config.norm_eps, dnormed, dx, pass.gradient(norm.weight),
                         pass.gradient(norm.bias));
      gradient->index_copy_(0, index, dx);
    }
    return sums;
  }
};

TrainableModel::TrainableModel(const checkpoint::Reader& reader, const LoraOptions& options, at::ScalarType dtype)
    : state_(std::make_unique<State>(reader, options, dtype)) {}

TrainableModel::~TrainableModel() = default;

const checkpoint::ModelConfig& TrainableModel::config() const {
  return state_->config;
}

std::vector<Parameter>& TrainableModel::parameters() {
  return state_->parameters;
}

void TrainableModel::set_activation_checkpointing(bool on) {
  state_->checkpointing = on;
}

LossSums TrainableModel::forward_backward(const Batch& batch, const TeacherView* teacher, const LossOptions& options,
                                          double scale, std::uint64_t dropout_seed,
                                          const std::function<void(std::int64_t layer)>& layer_done) {
  State& state = *state_;
  check_batch(batch, state.config);
  if (state.parameters.empty()) throw InternalError("a backward pass through a model of which nothing trains");
  const std::int64_t layers = state.config.layers;
  const Pass pass = state.pass_of(batch, true, dropout_seed);
  const auto done = [&](std::int64_t layer) {
    pass.hand_over(layer);
    if (layer_done) layer_done(layer);
  };
  std::vector<at::Tensor> inputs(static_cast<std::size_t>(layers));
  std::vector<std::optional<LayerState>> kept(static_cast<std::size_t>(layers));
  at::Tensor x = state.embed(pass, batch);
  for (std::int64_t l = 0; l < layers; ++l) {
    const auto i = static_cast<std::size_t>(l);
    inputs[i] = x;
    // The last layer's backward pass comes next: running it again would save nothing.
    if (!state.checkpointing || l + 1 == layers) kept[i].emplace();
    x = state.layers[i].forward(pass, x, kept[i] ? &*kept[i] : nullptr);
  }
  at::Tensor dx;
  const LossSums sums = state.head_loss(pass, x, batch, teacher, options, scale, &dx);
  x.reset();
  done(layers);
  for (std::int64_t l = layers; l-- > 0;) {
    const auto i = static_cast<std::size_t>(l);
    if (!kept[i]) {
      kept[i].emplace();
      state.layers[i].forward(pass, inputs[i], &*kept[i]);
    }
    inputs[i].reset();
    dx = state.layers[i].backward(pass, *kept[i], std::move(dx), l > 0 || state.options.full);
    kept[i].reset();
    done(l);
  }
  if (dx.defined()) state.embed_backward(pass, batch, dx);
  done(-1);
  return sums;
}

LossSums TrainableModel::evaluate(const Batch& batch, const TeacherView* teacher, const LossOptions& options) const {
  State& state = *state_;
  check_batch(batch, state.config);
  const Pass pass = state.pass_of(batch, false, 0);
  at::Tensor x = state.embed(pass, batch);
  for (const TrainableLayer& layer : state.layers) x = layer.forward(pass, x, nullptr);
  return state.head_loss(pass, x, batch, teacher, options, 0, nullptr);
}

at::Tensor TrainableModel::hidden(const Batch& batch) const {
  State& state = *state_;
  check_batch(batch, state.config);
  const Pass pass = state.pass_of(batch, false, 0);
  at::Tensor x = state.embed(pass, batch);
  for (const TrainableLayer& layer : state.layers) x = layer.forward(pass, x, nullptr);
  return x.index_select(0, at::nonzero(batch.targets.reshape({-1}).ge(0)).view({-1}).to(x.device()));
}

at::Tensor TrainableModel::logits(const at::Tensor& hidden) const {
  State& state = *state_;
  if (hidden.dim() != 2 || hidden.size(1) != state.config.hidden || hidden.scalar_type() != state.dtype)
    throw InternalError(fmt::format("logits of [{}] {}, expected [positions, {}] {}", fmt::join(hidden.sizes(), ", "),
                                    c10::toString(hidden.scalar_type()), state.config.hidden,
                                    c10::toString(state.dtype)));
  const Pass pass = state.bare_pass();
  at::Tensor out = at::empty({hidden.size(0), state.config.vocab}, hidden.options().dtype(parameter_type(state.dtype)));
  state.project_logits(state.final_norm(pass, hidden.contiguous()), pass.value(state.head), out);
  return out;
}

at::Tensor TrainableModel::merged(const std::string& name) const {
  const State& state = *state_;
  const auto find = [&](const std::string& wanted) -> const Parameter* {
    for (const Parameter& parameter : state.parameters)
      if (parameter.name == wanted) return &parameter;
    return nullptr;
  };
  if (state.options.full) {
    const Parameter* own = find(name);
    return own != nullptr ? own->value.clone() : at::Tensor();
  }
  if (!name.ends_with(".weight")) return {};
  const std::string module = name.substr(0, name.size() - std::string(".weight").size());
  const Parameter* a = find(adapter_tensor(module, 'A'));
  const Parameter* b = find(adapter_tensor(module, 'B'));
  if (a == nullptr || b == nullptr) return {};
  const at::ScalarType type = parameter_type(state.dtype);
  const at::Tensor weight = state.reader.load(name, {b->value.size(0), a->value.size(1)}, type);
  return weight.addmm_(b->value, a->value, 1, state.options.scale());
}

std::int64_t TrainableModel::bytes() const {
  const State& state = *state_;
  std::int64_t sum = 0;
  const auto count = [&](const at::Tensor& tensor) {
    if (tensor.defined()) sum += static_cast<std::int64_t>(tensor.nbytes());
  };
  count(state.embedding.frozen);
  if (!state.config.tied_embeddings) count(state.head.frozen);
  for (const Norm* norm : {&state.embedding_norm, &state.norm}) {
    count(norm->weight.frozen);
    count(norm->bias.frozen);
  }
  for (const TrainableLayer& layer : state.layers) sum += layer.frozen_bytes();
  for (const Parameter& parameter : state.parameters) {
    count(parameter.value);
    count(parameter.gradient);
  }
  return sum;
}

}  // namespace headfold::finetune
