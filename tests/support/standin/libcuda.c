// A CUDA driver without a GPU: it hands out handles, and tells a callback of each launch.
#include "cuda.h"
#include <stdint.h>

typedef void (*Launched)(uint64_t module, uint32_t programs, uint32_t smem, uint64_t stream,
                         void **parameters);
enum { MAX_MODULES = 1 << 16 };
static Launched launched;
static int capability = 90, load_error, capturing, modules, unloaded;
static char is_unloaded[MAX_MODULES];
static __thread CUcontext context;

void standin_callback(Launched function) { launched = function; }
void standin_capability(int value) { capability = value; }
void standin_load_error(int value) { load_error = value; }
void standin_capturing(int value) { capturing = value; }
int standin_unloaded(void) { return unloaded; }

#define OK return CUDA_SUCCESS
CUresult cuInit(unsigned flags) { OK; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; OK; }
CUresult cuDeviceGetCount(int *count) { *count = 1; OK; }
CUresult cuDeviceGet(CUdevice *device, int index) { *device = index; OK; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1000;
  }
  OK;
}
CUresult cuCtxGetCurrent(CUcontext *current) { *current = context; OK; }
CUresult cuCtxSetCurrent(CUcontext next) { context = next; OK; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  *retained = (CUcontext)(intptr_t)(device + 1);
  OK;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; OK; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
// a module's only function has its handle
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (load_error)
    return (CUresult)load_error;
  *module = (CUmodule)(intptr_t)(++modules);
  OK;
}
CUresult cuModuleUnload(CUmodule module) {
  is_unloaded[(intptr_t)module] = 1;
  unloaded++;
  OK;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  OK;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS              ? 100
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  OK;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { OK; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(uint64_t *)data = pointer;
  OK;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_NO_BINARY_FOR_GPU ? "no kernel image is available for execution"
                                                : "invalid resource handle";
  OK;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  OK;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  intptr_t module = (intptr_t)function;
  if (module < 1 || module > modules || is_unloaded[module])
    return CUDA_ERROR_INVALID_HANDLE;
  launched(module, config->gridDimX, config->sharedMemBytes, (uint64_t)config->hStream, parameters);
  OK;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *c) {
  *count = 16;
  OK;
}
CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
