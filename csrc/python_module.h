// An empty Python module of the limited API, so that a library of operators can also be imported by its name.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#define FFLFAST_PYTHON_MODULE(name)                                                                          \
  PyMODINIT_FUNC PyInit_##name(void) {                                                                       \
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, #name, nullptr, -1, nullptr, nullptr, nullptr,   \
                                     nullptr, nullptr};                                                      \
    return PyModule_Create(&definition);                                                                     \
  }
