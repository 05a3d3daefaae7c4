#pragma once
// Private: the MPI implementation of Backend.
#include <headfold/comm/communicator.h>

namespace headfold::comm {

/// MPI_Init_thread (MULTIPLE asked for, at least SERIALIZED required) and a duplicate of MPI_COMM_WORLD.
std::shared_ptr<Backend> start_mpi(int* argc, char*** argv);
void stop_mpi();
[[noreturn]] void abort_mpi(int exit_code);

}  // namespace headfold::comm
