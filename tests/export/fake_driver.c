/* A stand-in for libcuda.so.1 in tests: "device" memory is host memory, and a launch calls back into the test. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*Launch)(const char* entry, unsigned x, unsigned y, unsigned z, void** parameters);
static Launch launch;

void fake_set_launch(Launch callback) { launch = callback; }

int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 132; /* compute capability 9.0, 132 multiprocessors */
  return device;
}
int cuGetErrorString(int error, const char** text) {
  *text = "the test's own error";
  return error == 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* entry) {
  *function = (void*)entry;
  return module == NULL;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return function == NULL || attribute != 8 || value < 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (bx % 32 || by != 1 || bz != 1 || stream || extra) return 1;
  (void)shared;
  return launch((const char*)function, x, y, z, parameters);
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void* stream) {
  memset((void*)to, value, count);
  return stream != NULL;
}
int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) {
  for (size_t i = 0; i < count; ++i) ((unsigned*)to)[i] = value;
  return stream != NULL;
}
typedef struct {
  size_t source_x, source_y;
  int source_type;
  const void* source_host;
  uint64_t source;
  void* source_array;
  size_t source_pitch, target_x, target_y;
  int target_type;
  void* target_host;
  uint64_t target;
  void* target_array;
  size_t target_pitch, width, height;
} Memcpy2D;
int cuMemcpy2DAsync_v2(const Memcpy2D* c, void* stream) {
  for (size_t i = 0; i < c->height; ++i)
    memcpy((char*)c->target + c->target_x + i * c->target_pitch,
           (const char*)c->source + c->source_x + i * c->source_pitch, c->width);
  return stream != NULL || c->source_type != 2 || c->target_type != 2;
}
