"""Which variables of the environment reach the libraries: those that could change a result are taken away.

An artifact's fingerprint says what made it. A variable that another tool left behind, such as Accelerate's for
torch.compile, would give other bytes under the same fingerprint, and the store would hand them out for ever. So every
stage, and every rank, works without the variables of the families below. What a person may want to change is a
setting of the recipe, which is in the fingerprint.

Patterns are those of `fnmatch`. `tests/pipelines/core/test_environment.py` reads the sources of the installed libraries
and fails for a variable that is in neither table.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import pwd
import re
import stat
import tempfile
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

CLEARED: dict[str, str] = {
    "ACCELERATE_*": "precision, accumulation, clipping, ZeRO stage and torch.compile behind the recipe's back",
    "PARALLELISM_CONFIG_*": "Accelerate's parallelism; ranks are placed by our own launcher",
    "FSDP_*": "Accelerate's other engine",
    "MEGATRON_LM_*": "Accelerate's other engine",
    "FORK_LAUNCHED": "Accelerate's launcher in notebooks",
    "DS_*": "DeepSpeed's accelerator, its kernels and how they are built; ranks get DS_ACCELERATOR from the launcher",
    "DEEPSPEED_*": "as DS_",
    "AUTOEP_*": "DeepSpeed's experts",
    "LOCAL_SIZE": "rank of another launcher",
    "MPI_LOCALNRANKS": "rank of another launcher",
    "NODE_RANK": "rank of another launcher",
    "NPROC": "rank of another launcher",
    "OMPI_COMM_WORLD_*": "rank of another launcher",
    "PMI_*": "rank of another launcher",
    "ROLE_RANK": "rank of another launcher",
    "SMDATAPARALLEL_*": "rank of another launcher",
    "RANK": "rank of another launcher; ours sets it anew",
    "LOCAL_RANK": "as RANK",
    "WORLD_SIZE": "as RANK",
    "LOCAL_WORLD_SIZE": "as RANK",
    "MASTER_ADDR": "as RANK",
    "MASTER_PORT": "as RANK",
    "TORCHELASTIC_*": "as RANK",
    "TORCH_*": "choices of kernels and of precision, and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which unpickles",
    "PYTORCH_*": "choices of kernels, fusion and fallbacks",
    "TORCHDYNAMO_*": "what torch.compile compiles",
    "TORCHINDUCTOR_*": "what torch.compile generates: fusion, rounding, fast maths",
    "TORCHEXPORT_*": "as TORCHDYNAMO_",
    "INDUCTOR_*": "as TORCHINDUCTOR_",
    "AOT_*": "as TORCHINDUCTOR_",
    "AOTI*": "as TORCHINDUCTOR_",
    "TRITON_INTERPRET": "another implementation of every Triton kernel",
    "TRITON_USE_META_WS": "other Triton kernels",
    "CUTLASS_EPILOGUE_FUSION": "other kernels of torch.compile",
    "CUTEDSL_ENABLE_AUTOTUNING": "other kernels of torch.compile, by time",
    "ENABLE_PERSISTENT_TMA_MATMUL": "other kernels of torch.compile",
    "ENABLE_TEMPLATE_TMA_STORE": "other kernels of torch.compile",
    "ENABLE_TMA_LOAD_FOR_TEMPLATE_EPILOGUE": "other kernels of torch.compile",
    "TENSORIFY_PYTHON_SCALARS": "other graphs of torch.compile",
    "PT2_*": "torch.compile's caches",
    "TVM_SCHEDULER": "another backend of torch.compile",
    "ATEN_CPU_CAPABILITY": "other vector width, other order of sums",
    "DNNL_*": "kernels and precision of oneDNN",
    "ONEDNN_*": "as DNNL_",
    "USE_MKL_GEMM": "another matrix product",
    "MKL_*": "the branch of MKL and with it the order of its sums",
    "OMP_*": "threads and schedule: the order of sums",
    "CUBLAS*": "workspaces and kernels; ranks get CUBLAS_WORKSPACE_CONFIG from the stage",
    "CUDNN_*": "kernels",
    "NVIDIA_TF32_OVERRIDE": "precision of every matrix product",
    "NCCL_*": "algorithm and protocol of collectives: the order of sums",
    "GLOO_*": "interface and transport of the ranks; the launcher chooses the loopback",
    "TRANSFORMERS_*": "kernels of transformers",
    "FLASH_ATTENTION_DETERMINISTIC": "a kernel of transformers",
    "HCCL_*": "collectives of another accelerator",
    "ASCEND_LAUNCH_BLOCKING": "another accelerator",
    "NPU_*": "another accelerator",
    "PT_HPU_*": "another accelerator",
    "PJRT_DEVICE": "another accelerator",
    "TPU_NAME": "another accelerator",
    "XLA_*": "another accelerator, and its precision",
    "USE_TORCH_XLA": "another accelerator",
    "JAX_PLATFORMS": "another accelerator",
    "MORI_ENABLE_SDMA": "collectives of another accelerator",
    "XPU_*": "another accelerator",
    "USE_HUB_KERNELS": "kernels that transformers would fetch",
    "TRUST_REMOTE_CODE": "code that transformers would fetch",
    "FAKE_ALLOW_META": "torch's tests",
    "FX_PATCH_GETITEM": "other graphs",
    "UNSAFE_SKIP_FSDP_MODULE_GUARDS": "other graphs",
    "CFLAGS": "compiler options such as -ffast-math for kernels that are built here",
    "CXXFLAGS": "as CFLAGS",
    "LDFLAGS": "as CFLAGS",
    "KINETO_*": "hooks into every step",
    "QUACK_*": "kernels of torch.compile",
    "TQDM_POSITION": "where bars are drawn; ours are drawn by the console",
}
"""Pattern -> what it would change. Exceptions are in `KEPT`."""

KEPT: dict[str, str] = {
    # the machine: the same on every run here, or told by the recipe
    "OMP_NUM_THREADS": "how many cores this process may use; ranks get `pretrain.threads`",
    "MKL_NUM_THREADS": "as OMP_NUM_THREADS",
    "OMP_PLACES": "where threads run, not what they add up",
    "OMP_PROC_BIND": "as OMP_PLACES",
    "OMP_WAIT_POLICY": "how threads wait",
    "OMP_PREFIX": "folder of a compiler's library",
    "MKL_SERVICE_FORCE_INTEL": "which OpenMP library is loaded beside numpy's; without it the import may fail",
    "KMP_DUPLICATE_LIB_OK": "as MKL_SERVICE_FORCE_INTEL",
    "CUDA_VISIBLE_DEVICES": "which devices this process may use",
    "HIP_VISIBLE_DEVICES": "as CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES": "as CUDA_VISIBLE_DEVICES",
    "ZE_*": "as CUDA_VISIBLE_DEVICES",
    "NCCL_DEBUG*": "what NCCL logs",
    "NCCL_SOCKET_*": "which network ranks use",
    "NCCL_IB_*": "which network ranks use",
    "NCCL_NET*": "which network ranks use",
    "NCCL_P2P_*": "what the links between the devices of this machine can do",
    "NCCL_SHM_*": "as NCCL_P2P_",
    "PYTORCH_ALLOC_CONF": "how memory is cut up",
    "PYTORCH_CUDA_ALLOC_CONF": "as PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "as PYTORCH_ALLOC_CONF",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "how devices are counted",
    # where files lie
    "TORCH_HOME": "a folder",
    "TORCH_EXTENSIONS_DIR": "a folder",
    "TORCHINDUCTOR_CACHE_DIR": "a folder",
    "TRITON_CACHE_DIR": "a folder",
    "TRITON_HOME": "a folder",
    "TRITON_LIBDEVICE_PATH": "a file of the CUDA installation",
    "TRITON_PTXAS_PATH": "a program of the CUDA installation",
    "HF_*": "where models and data are fetched from; what was fetched is in the fingerprint",
    "HUGGINGFACE_*": "as HF_",
    "TRANSFORMERS_OFFLINE": "as HF_",
    "CUDA_*": "the CUDA installation, and how it reports errors",
    "CUDACXX": "the CUDA installation",
    "CUDNN_HOME": "a folder",
    "CUDNN_LIBRARY": "a folder",
    "CUDNN_PATH": "a folder",
    "ASCEND_HOME_PATH": "a folder",
    "CCL_ROOT": "a folder",
    "CONDA_PREFIX": "a folder",
    "CUTLASS_PATH": "a folder",
    "LD_LIBRARY_PATH": "a folder",
    "LEVEL_ZERO_V1_SDK_PATH": "a folder",
    "LIBRARY_PATH": "a folder",
    "NVSHMEM_LIB_DIR": "a folder",
    "ONEAPI_ROOT": "a folder",
    "ROCM_HOME": "a folder",
    "ROCM_PATH": "a folder",
    "ROCSHMEM_LIB_DIR": "a folder",
    "WINDOWS_CUDA_HOME": "a folder",
    "XDG_*": "folders",
    "PATH": "folders",
    "CPATH": "folders",
    "CPLUS_INCLUDE_PATH": "folders",
    "CUDA_INC_PATH": "folders",
    "HALIDE_*": "folders of a backend that no setting chooses",
    "LD_PRELOAD": "part of how the system was set up",
    "NVTOOLSEXT_PATH": "a folder",
    "CC": "the compiler of this machine",
    "CXX": "the compiler of this machine",
    "TORCH_CUDA_ARCH_LIST": "devices that kernels are built for",
    "PYTORCH_ROCM_ARCH": "as TORCH_CUDA_ARCH_LIST",
    "TORCH_XPU_ARCH_LIST": "as TORCH_CUDA_ARCH_LIST",
    "TORCHINDUCTOR_COMPILE_THREADS": "how many processes compile",
    "MAX_JOBS": "how many processes compile",
    "CONDA_EXE": "a program",
    "PYTHON_EXEC": "a program",
    "VIRTUAL_ENV": "a folder",
    "PROGRAMFILES": "a folder",
    "SYSTEMROOT": "a folder",
    # what is said, and to whom
    "TORCH_LOGS": "what torch logs",
    "TORCH_CPP_LOG_LEVEL": "what torch logs",
    "TORCH_SHOW_CPP_STACKTRACES": "what torch logs",
    "TORCH_DISTRIBUTED_DEBUG": "what torch checks and logs of collectives",
    "TORCH_NCCL_*": "when a collective counts as hung, and what is written then",
    "TORCH_FR_*": "as TORCH_NCCL_",
    "TRANSFORMERS_VERBOSITY": "what transformers logs",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "what transformers logs",
    "TRANSFORMERS_IS_CI": "what transformers reports",
    "TOKENIZERS_PARALLELISM": "threads over texts; each text is encoded by itself",
    "GLOO_LOG_LEVEL": "what gloo logs",
    "LOGLEVEL": "what is logged",
    "LOG_*": "what is logged",
    "DISABLE_LOGS_WHILE_COMPILING": "what is logged",
    "LOGGER_METHODS_TO_EXCLUDE_FROM_DISABLE": "what is logged",
    "NETWORK_DEBUG_REPORT*": "what is logged",
    "NO_COLOR": "what is logged",
    "COMPILE_STROBELIGHT_*": "a profiler",
    "CUDA_PROFILE": "a profiler",
    "*CUPTI*": "a profiler",
    "ENABLE_PYTORCH_EXECUTION_TRACE*": "a profiler",
    "FR_TRACE_VERBOSE_OUTPUT": "a profiler",
    "FX_GRAPH_SHOW_*": "pictures of graphs",
    "PARTITIONER_MEMORY_BUDGET_PARETO*": "pictures of graphs",
    "DUMP_AOTI_MINIFIER": "files about a failed compilation",
    "CI": "a place, not a choice",
    "BRANCH": "a place, not a choice",
    "USER": "a person",
    "USERNAME": "a person",
    "IS_FBCODE": "a place",
    "MAST_HPC_JOB_NAME": "a place",
    "FOO": "an example in a docstring of Accelerate",
    # parts of the libraries that nothing here uses: trainers, their reports, their launchers
    "AWS_*": "credentials",
    "AZ_*": "another launcher of DeepSpeed",
    "DLTS_JOB_ID": "another launcher of DeepSpeed",
    "DLWS_JOB_ID": "another launcher of DeepSpeed",
    "CLEARML_*": "reports of a trainer that is not used",
    "COMET_*": "as CLEARML_",
    "SWANLAB_*": "as CLEARML_",
    "TENSORBOARD_*": "as CLEARML_",
    "WANDB_*": "as CLEARML_",
    "MLFLOW_*": "where runs are reported",
    "DATABRICKS_RUNTIME_VERSION": "as CLEARML_",
    "DISABLE_*_INTEGRATION": "as CLEARML_",
    "ECS_CONTAINER_METADATA_URI": "as CLEARML_",
    "KUBEFLOW_*": "as CLEARML_",
    "RAY_SCOPE": "as CLEARML_",
    "SM_*": "as CLEARML_",
    "TRAINING_JOB_ARN": "as CLEARML_",
    "BENCHMARK_USE_DEV_SHM": "torch's benchmarks",
    "DCP_*": "torch's distributed checkpoints, which are not used",
    "LTC_MAX_ASYNC_QUEUE": "torch's lazy tensors, which are not used",
    "PIP_DISABLE_PIP_VERSION_CHECK": "pip",
    "USE_LIBUV": "how the store of a process group waits",
}
"""Pattern -> why it may stay, although it is in a family of `CLEARED` or read by a library."""


def _any_of(patterns: Mapping[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))


_CLEARED, _KEPT = _any_of(CLEARED), _any_of(KEPT)


def is_cleared(name: str) -> bool:
    """Tell whether stages and ranks work without this variable."""
    return _CLEARED.match(name) is not None and not is_kept(name)


def is_kept(name: str) -> bool:
    """Tell whether this variable may stay; an entry without a wildcard counts more than a family."""
    if name in CLEARED or name in KEPT:
        return name in KEPT
    return _KEPT.match(name) is not None


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def reach_this_machine() -> None:
    """Let this process and its children reach servers on this machine without a proxy, whatever the variables say."""
    for name in ("NO_PROXY", "no_proxy"):
        present = [each.strip() for each in os.environ.get(name, "").split(",") if each.strip()]
        if "*" not in present:
            os.environ[name] = ",".join([*present, *(each for each in _LOOPBACK if each not in present)])


def find_home() -> None:
    """Give a user whom the system does not know (a number in a container) a home and a name, as libraries ask for them.

    The home is a folder for temporary files that nobody else can read; a user who has a home keeps it.
    """
    known = _is_known_user()
    if not known and not os.environ.get("HOME"):
        place = Path(tempfile.gettempdir()) / f"ingot-home-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
        state = place.lstat()
        if state.st_uid != os.geteuid() or not stat.S_ISDIR(state.st_mode) or state.st_mode & 0o077:
            place = Path(tempfile.mkdtemp(prefix="ingot-home-"))  # somebody was here first
        os.environ["HOME"] = str(place)
    if not known and not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = str(os.geteuid())


def _is_known_user() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def is_this_machine(url: str) -> bool:
    """Tell whether an address is one of this machine's own."""
    host = urllib.parse.urlsplit(url).hostname or ""
    return host in _LOOPBACK or re.fullmatch(r"127(\.\d+){3}", host) is not None


def cleared(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that could change a result."""
    return {name: value for name, value in variables.items() if not is_cleared(name)}


def clear() -> list[str]:
    """Take those variables out of this process's environment; returns and logs their names, never their values."""
    names = sorted(name for name in os.environ if is_cleared(name))
    for name in names:
        del os.environ[name]
    if names:
        log.warning("taken out of the environment, because results would depend on them: %s", ", ".join(names))
    return names
