// A stand-in for libcuda.so.1 that runs on the CPU, for tests: PyCUDA, unmodified, works over it.
//
// "Device memory" is memory of the process, with canaries on both sides and full of NaN when it is new. A module is a
// shared library that fake_cuda/nvcc.py made; a launch runs its kernel over cuda_host.h, in both orders of threads if
// FAKE_CUDA_BOTH is set. Streams run synchronously, so a missing event is not noticed; captured work is kept and runs
// when the graph is launched. Any wrong address, size or handle is an error of the call.
//
// What may go wrong is told by the environment: FAKE_CUDA_DEVICES (a number), FAKE_CUDA_MEMORY (bytes),
// FAKE_CUDA_SHARED (bytes of a block), FAKE_CUDA_VERSION, FAKE_CUDA_FAIL="function:n:code" (the n-th call of the function returns the code).
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

typedef int Result;
typedef unsigned long long Pointer;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_CONTEXT = 201, BAD_IMAGE = 200, NOT_FOUND = 500,
       ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801 };
enum { CANARY = 256, PROCESSORS = 132, TOO_LARGE = 720, DECLARED_SHARED = 48 << 10, MOST_SHARED = 227 << 10 };

static long long setting(const char* name, long long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoll(text) : otherwise;
}

// --- calls that shall fail

static std::map<std::string, int> calls;

static Result planned(const char* function) {
  const int count = ++calls[function];
  const char* text = getenv("FAKE_CUDA_FAIL");
  if (!text) return OK;
  const std::string wish = text;
  const size_t first = wish.find(':'), second = wish.find(':', first + 1);
  if (first == std::string::npos || second == std::string::npos || wish.substr(0, first) != function) return OK;
  return atoi(wish.c_str() + first + 1) == count ? atoi(wish.c_str() + second + 1) : OK;
}
#define ENTER if (Result failed = planned(__func__)) return failed

// --- memory

struct Block { char* raw; size_t size; };
static std::map<Pointer, Block> blocks;
static size_t allocated, peak;
static Result sticky;  // a fault of a kernel spoils the context

static Result allocate(Pointer* out, size_t size) {
  if (!size) return INVALID;
  if (allocated + size > (size_t)setting("FAKE_CUDA_MEMORY", 1ll << 30)) return OUT_OF_MEMORY;
  char* raw = (char*)aligned_alloc(256, (size + 2 * CANARY + 255) / 256 * 256);
  if (!raw) return OUT_OF_MEMORY;
  memset(raw, 0xa5, CANARY);
  memset(raw + CANARY, 0xff, size);
  memset(raw + CANARY + size, 0xa5, CANARY);
  *out = (Pointer)(raw + CANARY);
  blocks[*out] = {raw, size};
  allocated += size;
  if (allocated > peak) peak = allocated;
  return OK;
}

static bool intact(const Block& b) {
  for (int i = 0; i < CANARY; i++)
    if ((unsigned char)b.raw[i] != 0xa5 || (unsigned char)b.raw[CANARY + b.size + i] != 0xa5) return false;
  return true;
}

static Result release(Pointer at) {
  auto found = blocks.find(at);
  if (found == blocks.end()) return INVALID;
  const bool fine = intact(found->second);
  allocated -= found->second.size;
  free(found->second.raw);
  blocks.erase(found);
  return fine ? OK : ILLEGAL_ADDRESS;
}

static bool inside(Pointer at, size_t size) {
  auto found = blocks.upper_bound(at);
  if (found == blocks.begin()) return false;
  --found;
  return at + size <= found->first + found->second.size;
}

// --- contexts, streams, events

static int context_marker, retained;
static std::vector<void*> stack;
static int streams, events, modules, graphs;

struct Stream { bool capturing; std::vector<std::function<Result()>>* graph; };
static Stream default_stream = {false, nullptr};

static Stream* stream_of(void* s) { return (size_t)s < 16 ? &default_stream : (Stream*)s; }

static Result perform(void* stream, std::function<Result()> work) {
  if (stack.empty()) return NO_CONTEXT;
  if (sticky) return sticky;
  Stream* s = stream_of(stream);
  if (s->capturing) {
    s->graph->push_back(work);
    return OK;
  }
  return work();
}

// --- modules

typedef const char* (*Launcher)(void**, int, int, int, int);
struct Module { void* library; std::string path; };
struct Function { Launcher launch; const int* layout; bool together; int shared; };  // layout: how many parameters, their sizes

extern "C" {

size_t fake_cuda_allocated() { return allocated; }
size_t fake_cuda_peak() { return peak; }
int fake_cuda_handles() { return streams + events + modules + graphs + retained + (int)stack.size(); }
int fake_cuda_calls(const char* function) { return calls[function]; }

Result cuInit(unsigned) { ENTER; return setting("FAKE_CUDA_DEVICES", 1) ? OK : NO_DEVICE; }
Result cuDriverGetVersion(int* version) { ENTER; *version = (int)setting("FAKE_CUDA_VERSION", 13000); return OK; }
Result cuGetErrorString(Result code, const char** text) {
  static const std::map<int, const char*> texts = {
      {OK, "no error"}, {INVALID, "invalid argument"}, {OUT_OF_MEMORY, "out of memory"},
      {NO_DEVICE, "no CUDA-capable device is detected"}, {NO_CONTEXT, "invalid device context"},
      {BAD_IMAGE, "device kernel image is invalid"}, {NOT_FOUND, "named symbol not found"},
      {ILLEGAL_ADDRESS, "an illegal memory access was encountered"}, {LAUNCH_FAILED, "unspecified launch failure"},
      {NOT_SUPPORTED, "operation not supported"}};
  auto found = texts.find(code);
  *text = found == texts.end() ? "unrecognized error code" : found->second;
  return OK;
}

Result cuDeviceGetCount(int* count) { ENTER; *count = (int)setting("FAKE_CUDA_DEVICES", 1); return OK; }
Result cuDeviceGet(int* device, int ordinal) {
  ENTER;
  *device = ordinal;
  return ordinal < setting("FAKE_CUDA_DEVICES", 1) ? OK : 101;
}
Result cuDeviceGetName(char* name, int size, int) { snprintf(name, (size_t)size, "Simulated GPU"); return OK; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = (size_t)setting("FAKE_CUDA_MEMORY", 1ll << 30); return OK; }
Result cuDeviceComputeCapability(int* major, int* minor, int) { *major = 9; *minor = 0; return OK; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> values = {{1, 1024}, {2, 1024}, {5, 2147483647}, {8, 49152}, {10, 32}, {12, 65536},
                                            {16, PROCESSORS}, {38, 50 << 20}, {39, 2048}, {75, 9}, {76, 0}, {81, 233472}};
  auto found = values.find(attribute);
  *value = found == values.end() ? 1 : found->second;
  if (attribute == 97) *value = (int)setting("FAKE_CUDA_SHARED", MOST_SHARED);
  return OK;
}

Result cuDevicePrimaryCtxRetain(void** context, int) { ENTER; *context = &context_marker; retained++; return OK; }
Result cuDevicePrimaryCtxRelease_v2(int) { retained--; return OK; }
Result cuCtxPushCurrent_v2(void* context) { stack.push_back(context); return OK; }
Result cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) return NO_CONTEXT;
  if (context) *context = stack.back();
  stack.pop_back();
  return OK;
}
Result cuCtxGetCurrent(void** context) { *context = stack.empty() ? nullptr : stack.back(); return OK; }
Result cuCtxGetDevice(int* device) { *device = 0; return stack.empty() ? NO_CONTEXT : OK; }
Result cuCtxGetApiVersion(void*, unsigned* version) { *version = 13000; return OK; }
Result cuCtxSynchronize() { ENTER; return stack.empty() ? NO_CONTEXT : sticky; }

Result cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void*) {
  ENTER;
  if (stack.empty()) return NO_CONTEXT;
  unsigned long long size;  // the image begins with a mark and the size of the library behind it
  if (memcmp(image, "FAKECUBN", 8)) return BAD_IMAGE;
  memcpy(&size, (const char*)image + 8, 8);
  char path[] = "/tmp/fake_cubin_XXXXXX";
  const int file = mkstemp(path);
  if (file < 0 || write(file, (const char*)image + 16, size) != (ssize_t)size) return BAD_IMAGE;
  close(file);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  unlink(path);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return BAD_IMAGE;
  }
  *module = new Module{library, path};
  modules++;
  return OK;
}
Result cuModuleLoadData(void** module, const void* image) { return cuModuleLoadDataEx(module, image, 0, nullptr, nullptr); }
Result cuModuleUnload(void* module) {
  dlclose(((Module*)module)->library);
  delete (Module*)module;
  modules--;
  return OK;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  void* library = ((Module*)module)->library;
  Launcher launch = (Launcher)dlsym(library, (std::string("launch_") + name).c_str());
  const int* layout = (const int*)dlsym(library, (std::string("layout_") + name).c_str());
  if (!launch || !layout) return NOT_FOUND;
  *function = new Function{launch, layout, std::string(name).rfind("loop_", 0) == 0, DECLARED_SHARED};
  return OK;
}
Result cuModuleGetGlobal_v2(Pointer*, size_t*, void*, const char*) { return NOT_FOUND; }
Result cuFuncGetAttribute(int* value, int attribute, void*) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;
  return OK;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  ENTER;
  if (attribute != 8 || value > setting("FAKE_CUDA_SHARED", MOST_SHARED)) return INVALID;
  ((Function*)function)->shared = value;
  return OK;
}

static Result launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, void* stream, void** parameters, void** extra) {
  const Function* f = (Function*)function;
  if ((int)shared > f->shared) return INVALID;
  if (!gx || !bx || bx > 1024 || gy * gz * by * bz != 1) return INVALID;
  std::vector<std::vector<char>> values;
  if (parameters) {
    for (int i = 0; i < f->layout[0]; i++)
      values.emplace_back((char*)parameters[i], (char*)parameters[i] + f->layout[i + 1]);
  } else if (extra) {  // one buffer, in which each parameter is aligned to its size
    const char* buffer = nullptr;
    size_t size = 0, at = 0;
    for (void** e = extra; *e; e += 2) {
      if ((size_t)*e == 1) buffer = (const char*)e[1];
      if ((size_t)*e == 2) size = *(size_t*)e[1];
    }
    for (int i = 0; i < f->layout[0]; i++) {
      const size_t width = (size_t)f->layout[i + 1];
      at = (at + width - 1) / width * width;
      if (!buffer || at + width > size) return INVALID;
      values.emplace_back(buffer + at, buffer + at + width);
      at += width;
    }
  }
  if ((int)values.size() != f->layout[0]) return INVALID;
  return perform(stream, [=]() -> Result {
    std::vector<std::vector<char>> own = values;
    std::vector<void*> at;
    for (auto& v : own) at.push_back(v.data());
    const char* fault = f->launch(at.data(), (int)gx, (int)bx, (int)shared, 0);
    if (fault) fprintf(stderr, "fake CUDA: %s\n", fault);
    for (auto& b : blocks)
      if (!intact(b.second)) {
        fprintf(stderr, "fake CUDA: a kernel wrote outside an allocation of %zu bytes\n", b.second.size);
        return sticky = ILLEGAL_ADDRESS;
      }
    return fault ? sticky = LAUNCH_FAILED : OK;
  });
}

Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void* stream, void** parameters, void** extra) {
  ENTER;
  if (((Function*)function)->together) return INVALID;
  return launch(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra);
}

// Blocks that wait for each other must be resident at once: FAKE_CUDA_RESIDENT tells how many of them a processor holds.
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  ENTER;
  *blocks = (int)setting("FAKE_CUDA_RESIDENT", 1);
  return OK;
}
Result cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                 unsigned bz, unsigned shared, void* stream, void** parameters) {
  ENTER;
  if (!parameters || !((Function*)function)->together) return INVALID;
  if (gx > setting("FAKE_CUDA_RESIDENT", 1) * PROCESSORS) return TOO_LARGE;
  return launch(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, nullptr);
}

Result cuMemAlloc_v2(Pointer* out, size_t size) { ENTER; return stack.empty() ? NO_CONTEXT : allocate(out, size); }
Result cuMemFree_v2(Pointer at) { ENTER; return stack.empty() ? NO_CONTEXT : release(at); }
Result cuMemAllocAsync(Pointer* out, size_t size, void* stream) {
  ENTER;
  if (stack.empty()) return NO_CONTEXT;
  return stream_of(stream)->capturing ? INVALID : allocate(out, size);
}
Result cuMemFreeAsync(Pointer at, void* stream) {  // not as a part of a graph, which would free it each time
  ENTER;
  return stream_of(stream)->capturing ? INVALID : release(at);
}
Result cuMemGetInfo_v2(size_t* left, size_t* total) {
  *total = (size_t)setting("FAKE_CUDA_MEMORY", 1ll << 30);
  *left = *total - allocated;
  return OK;
}
Result cuMemHostAlloc(void** out, size_t size, unsigned) { ENTER; *out = malloc(size ? size : 1); return OK; }
Result cuMemFreeHost(void* at) { free(at); return OK; }
Result cuMemHostRegister_v2(void*, size_t, unsigned) { return OK; }
Result cuMemHostUnregister(void*) { return OK; }

Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t size, void* stream) {
  ENTER;
  if (!inside(to, size)) return INVALID;
  return perform(stream, [=] { memcpy((void*)to, from, size); return OK; });
}
Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t size, void* stream) {
  ENTER;
  if (!inside(from, size)) return INVALID;
  return perform(stream, [=] { memcpy(to, (void*)from, size); return OK; });
}
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t size, void* stream) {
  ENTER;
  if (!inside(to, size) || !inside(from, size)) return INVALID;
  return perform(stream, [=] { memmove((void*)to, (void*)from, size); return OK; });
}
Result cuMemcpyHtoD_v2(Pointer to, const void* from, size_t size) { return cuMemcpyHtoDAsync_v2(to, from, size, nullptr); }
Result cuMemcpyDtoH_v2(void* to, Pointer from, size_t size) { return cuMemcpyDtoHAsync_v2(to, from, size, nullptr); }
Result cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t size) { return cuMemcpyDtoDAsync_v2(to, from, size, nullptr); }
Result cuMemsetD8Async(Pointer at, unsigned char value, size_t count, void* stream) {
  ENTER;
  if (!inside(at, count)) return INVALID;
  return perform(stream, [=] { memset((void*)at, value, count); return OK; });
}
Result cuMemsetD8_v2(Pointer at, unsigned char value, size_t count) { return cuMemsetD8Async(at, value, count, nullptr); }

Result cuStreamCreate(void** stream, unsigned) { ENTER; *stream = new Stream{false, nullptr}; streams++; return OK; }
Result cuStreamDestroy_v2(void* stream) { delete (Stream*)stream; streams--; return OK; }
Result cuStreamSynchronize(void*) { ENTER; return sticky; }
Result cuStreamQuery(void*) { return sticky; }
Result cuStreamWaitEvent(void* stream, void*, unsigned) { return perform(stream, [] { return OK; }); }
Result cuStreamBeginCapture_v2(void* stream, int) {
  ENTER;
  Stream* s = stream_of(stream);
  if (s == &default_stream || s->capturing) return INVALID;
  s->capturing = true;
  s->graph = new std::vector<std::function<Result()>>;
  graphs++;
  return OK;
}
Result cuStreamEndCapture(void* stream, void** graph) {
  ENTER;
  Stream* s = stream_of(stream);
  if (!s->capturing) return INVALID;
  s->capturing = false;
  *graph = s->graph;
  return OK;
}
Result cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  ENTER;
  *executable = new std::vector<std::function<Result()>>(*(std::vector<std::function<Result()>>*)graph);
  graphs++;
  return OK;
}
Result cuGraphLaunch(void* executable, void* stream) {
  ENTER;
  for (auto& work : *(std::vector<std::function<Result()>>*)executable)
    if (Result code = perform(stream, work)) return code;
  return OK;
}
Result cuGraphDestroy(void* graph) { delete (std::vector<std::function<Result()>>*)graph; graphs--; return OK; }
Result cuGraphExecDestroy(void* executable) { return cuGraphDestroy(executable); }

Result cuEventCreate(void** event, unsigned) { *event = new int; events++; return OK; }
Result cuEventDestroy_v2(void* event) { delete (int*)event; events--; return OK; }
Result cuEventRecord(void*, void* stream) { return perform(stream, [] { return OK; }); }
Result cuEventSynchronize(void*) { return sticky; }
Result cuEventQuery(void*) { return sticky; }
Result cuEventElapsedTime_v2(float* ms, void*, void*) { *ms = 0; return OK; }

// --- what PyCUDA links against and nothing here uses
#define ABSENT(name) Result name() { return NOT_SUPPORTED; }
ABSENT(cuArray3DCreate_v2) ABSENT(cuArray3DGetDescriptor_v2) ABSENT(cuArrayCreate_v2) ABSENT(cuArrayDestroy)
ABSENT(cuArrayGetDescriptor_v2) ABSENT(cuCtxAttach) ABSENT(cuCtxCreate_v4) ABSENT(cuCtxDetach)
ABSENT(cuCtxDisablePeerAccess) ABSENT(cuCtxEnablePeerAccess) ABSENT(cuCtxGetCacheConfig) ABSENT(cuCtxGetLimit)
ABSENT(cuCtxGetSharedMemConfig) ABSENT(cuCtxSetCacheConfig) ABSENT(cuCtxSetLimit) ABSENT(cuCtxSetSharedMemConfig)
ABSENT(cuDeviceCanAccessPeer) ABSENT(cuDeviceGetByPCIBusId) ABSENT(cuDeviceGetPCIBusId) ABSENT(cuFuncSetBlockShape)
ABSENT(cuFuncSetCacheConfig) ABSENT(cuFuncSetSharedSize) ABSENT(cuIpcCloseMemHandle) ABSENT(cuIpcGetEventHandle)
ABSENT(cuIpcGetMemHandle) ABSENT(cuIpcOpenEventHandle) ABSENT(cuIpcOpenMemHandle_v2) ABSENT(cuLaunch)
ABSENT(cuLaunchGrid) ABSENT(cuLaunchGridAsync) ABSENT(cuLinkAddData_v2) ABSENT(cuLinkAddFile_v2)
ABSENT(cuLinkComplete) ABSENT(cuLinkCreate_v2) ABSENT(cuLinkDestroy) ABSENT(cuMemAllocManaged)
ABSENT(cuMemAllocPitch_v2) ABSENT(cuMemGetAddressRange_v2) ABSENT(cuMemHostGetDevicePointer_v2)
ABSENT(cuMemHostGetFlags) ABSENT(cuMemcpy2DAsync_v2) ABSENT(cuMemcpy2DUnaligned_v2) ABSENT(cuMemcpy2D_v2)
ABSENT(cuMemcpy3DAsync_v2) ABSENT(cuMemcpy3DPeer) ABSENT(cuMemcpy3DPeerAsync) ABSENT(cuMemcpy3D_v2)
ABSENT(cuMemcpyAtoA_v2) ABSENT(cuMemcpyAtoD_v2) ABSENT(cuMemcpyAtoH_v2) ABSENT(cuMemcpyDtoA_v2)
ABSENT(cuMemcpyHtoA_v2) ABSENT(cuMemcpyPeer) ABSENT(cuMemcpyPeerAsync) ABSENT(cuMemsetD16Async) ABSENT(cuMemsetD16_v2)
ABSENT(cuMemsetD2D16Async) ABSENT(cuMemsetD2D16_v2) ABSENT(cuMemsetD2D32Async) ABSENT(cuMemsetD2D32_v2)
ABSENT(cuMemsetD2D8Async) ABSENT(cuMemsetD2D8_v2) ABSENT(cuMemsetD32Async) ABSENT(cuMemsetD32_v2)
ABSENT(cuModuleGetSurfRef) ABSENT(cuModuleGetTexRef) ABSENT(cuModuleLoad) ABSENT(cuParamSetSize)
ABSENT(cuParamSetTexRef) ABSENT(cuParamSetf) ABSENT(cuParamSeti) ABSENT(cuParamSetv) ABSENT(cuProfilerInitialize)
ABSENT(cuProfilerStart) ABSENT(cuProfilerStop) ABSENT(cuStreamAttachMemAsync) ABSENT(cuSurfRefGetArray)
ABSENT(cuSurfRefSetArray) ABSENT(cuTexRefCreate) ABSENT(cuTexRefDestroy) ABSENT(cuTexRefGetAddressMode)
ABSENT(cuTexRefGetAddress_v2) ABSENT(cuTexRefGetArray) ABSENT(cuTexRefGetFilterMode) ABSENT(cuTexRefGetFlags)
ABSENT(cuTexRefGetFormat) ABSENT(cuTexRefSetAddress2D_v3) ABSENT(cuTexRefSetAddressMode) ABSENT(cuTexRefSetAddress_v2)
ABSENT(cuTexRefSetArray) ABSENT(cuTexRefSetFilterMode) ABSENT(cuTexRefSetFlags) ABSENT(cuTexRefSetFormat)
}
