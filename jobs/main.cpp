// headfold: dispatches to one job per sub-command and turns an error into one log line, a hint and a documented exit
// code.

#include <ATen/core/grad_mode.h>
#include <headfold/base/log.h>
#include <headfold/base/stop.h>
#include <headfold/base/version.h>
#include <headfold/comm/watchdog.h>
#include <headfold/device/device.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string_view>

#include "session.h"

namespace headfold::jobs {
namespace {

constexpr Job kJobs[] = {
    {"calibrate", "collect calibration statistics of a model over a text", calibrate, check_calibrate},
    {"convert", "fold KV heads: statistics + model -> smaller model", convert, check_convert},
    {"finetune", "train adapters of a model on text, from a teacher or without one", finetune_model, check_finetune},
    {"evaluate", "perplexity, KL divergence and agreement of a model", evaluate, check_evaluate},
    {"verify", "measure what a fold changed, layer by layer, against what was predicted", verify},
    {"export", "write a folded model for runtimes that do not know its layout", export_model},
    {"report", "HTML, Markdown and CSV report of a run folder", report},
    {"run", "all stages that a configuration file asks for, one after the other", run_pipeline},
    {"generate", "continue a prompt", generate},
    {"logits", "logits for given token ids, for parity with any other engine", logits},
    {"inspect", "say what a checkpoint, statistics file, plan or result is", inspect},
    {"synthesize", "write a checkpoint of random weights at real shapes", synthesize},
    {"bench", "measure what predictions of run --dry-run --nodes need", bench_machine},
};

std::string help_text() {
  std::string text =
      "headfold folds the key/value heads of a pretrained LLaMA or BLOOM checkpoint (MHA -> GQA).\n\n"
      "usage: headfold JOB [options]      headfold JOB --help      headfold --version\n"
      "       mpirun -np N headfold JOB [options]                  srun --mpi=pmix headfold JOB [options]\n\njobs:\n";
  for (const Job& job : kJobs) text += fmt::format("  {:<12}{}\n", job.name, job.summary);
  return text + "\nexit codes: 0 done, 64 usage, 65 bad input, 70 internal, 74 input/output, 75 stopped on request\n";
}

}  // namespace

const Job& find_job(const std::string& name) {
  for (const Job& job : kJobs)
    if (name == job.name) return job;
  std::string names;
  for (const Job& job : kJobs) names += fmt::format("{}{}", names.empty() ? "" : ", ", job.name);
  throw UsageError(fmt::format("there is no job '{}'; jobs are {}", name, names), "headfold --help");
}

namespace {

/// Jobs that end in good order when they are asked to.
bool can_stop(const std::string& name) {
  const auto names = {"calibrate", "convert", "evaluate", "finetune", "run", "verify"};
  return std::find(names.begin(), names.end(), name) != names.end();
}

int run(int argc, char** argv) {
  start_logging(0, 1);
  if (argc > 1 && can_stop(argv[1])) listen_for_stop();  // before MPI: starting it takes seconds on many nodes
  std::unique_ptr<comm::Environment> environment;
  try {
    environment = std::make_unique<comm::Environment>(&argc, &argv);
  } catch (const std::exception& error) {
    spdlog::error("{}", describe(error));
    return static_cast<int>(exit_code_of(error));
  }
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const Context context{*environment, environment->world()};
  start_logging(context.world.rank(), context.world.size());
  const bool speaks = context.world.root();
  std::string name = "headfold";
  std::unique_ptr<comm::Watchdog> watchdog;  // outlives what is thrown: its threads answer while a rank fails
  try {
    if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
      if (speaks) std::cout << help_text();
      return arguments.empty() ? static_cast<int>(ExitCode::usage) : 0;
    }
    if (arguments[0] == "--version") {
      if (speaks) std::cout << build_description();
      return 0;
    }
    const Job& job = find_job(arguments[0]);
    name = job.name;
    watchdog = std::make_unique<comm::Watchdog>(context.world,
                                                [&](const MpiFailure& hang) { fail(*environment, name, hang, true); });
    meet(context);
    const at::NoGradGuard no_grad;
    run_job(context, job, {arguments.begin() + 1, arguments.end()});
  } catch (const HelpShown&) {
    return 0;
  } catch (const Stopped& stopped) {
    // Every rank stopped at the same step: an orderly end, not an abort.
    spdlog::info("{}: {}\n  hint: {}", name, stopped.what(), stopped.hint());
    return static_cast<int>(stopped.code());
  } catch (const std::bad_alloc&) {
    fail(*environment, name,
         Error(ExitCode::internal, "out of memory",
               "use more ranks, smaller micro-batches, or --streamed where the job has it"),
         false);
  } catch (const std::exception& error) {
    fail(*environment, name, error, false);
  }
  return 0;
}

}  // namespace
}  // namespace headfold::jobs

int main(int argc, char** argv) {
  const bool computes = argc > 2 && std::none_of(argv + 1, argv + argc, [](const char* argument) {
                          return std::string_view(argument) == "--help" || std::string_view(argument) == "-h";
                        });
  if (computes)
    headfold::device::restart_with_fast_blas(argv);  // a start takes half a second: help need not wait for two
  headfold::device::keep_freed_memory();
  const int code = headfold::jobs::run(argc, argv);
  // Everything of ours is closed and MPI finalized. Taking libtorch's operators out of its tables again, one by one,
  // would take a sixth of the time of a short run.
  std::cout.flush();
  spdlog::shutdown();
  std::fflush(nullptr);
  std::_Exit(code);
}
