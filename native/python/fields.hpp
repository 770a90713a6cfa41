// Dictionaries from Python that describe a model, read as if an enemy had written them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/view.hpp"

namespace gossamer {

namespace nb = nanobind;

// A dictionary with text as keys. Every access raises FormatError, which names the field, when it is missing
// or is not of the type asked for.
class Fields {
  public:
    // `what` names the dictionary in messages.
    Fields(nb::handle dictionary, std::string what) : what_(std::move(what)) {
        if (!nb::isinstance<nb::dict>(dictionary)) throw FormatError(what_ + " is not a dictionary");
        fields_ = nb::borrow<nb::dict>(dictionary);
    }

    nb::handle at(const char* key) const {
        PyObject* value = PyDict_GetItemString(fields_.ptr(), key);
        if (value == nullptr) throw FormatError(what_ + " lacks " + key);
        return value;
    }

    int integer(const char* key) const {
        const nb::handle value = at(key);
        int number = 0;
        if (PyBool_Check(value.ptr()) || !nb::try_cast(value, number, false))
            refuse(key, "an integer of 32 bits");
        return number;
    }

    float number(const char* key) const {
        const nb::handle value = at(key);
        float number = 0;
        if (!nb::isinstance<nb::float_>(value) || !nb::try_cast(value, number)) refuse(key, "a number");
        return number;
    }

    bool flag(const char* key) const {
        if (!PyBool_Check(at(key).ptr())) refuse(key, "True or False");
        return at(key).ptr() == Py_True;
    }

    std::string text(const char* key) const { return text_of(at(key), key); }

    std::vector<float> floats(const char* key) const {
        nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu> array;
        if (!nb::try_cast(at(key), array, false)) refuse(key, "an array of float32");
        return {array.data(), array.data() + array.size()};
    }

    // A dictionary of texts.
    std::map<std::string, std::string> texts(const char* key) const {
        std::map<std::string, std::string> found;
        for (const auto& [name, value] : items(key)) found[name] = text_of(value, key);
        return found;
    }

    // The entries of a dictionary of anything.
    std::vector<std::pair<std::string, nb::handle>> items(const char* key) const {
        return Fields(at(key), what_ + ": " + key).items();
    }

    std::vector<std::pair<std::string, nb::handle>> items() const {
        std::vector<std::pair<std::string, nb::handle>> found;
        for (auto [name, value] : fields_) found.emplace_back(text_of(name, "a key"), value);
        return found;
    }

    std::vector<nb::handle> list(const char* key) const {
        if (!nb::isinstance<nb::list>(at(key))) refuse(key, "a list");
        std::vector<nb::handle> found;
        for (nb::handle item : nb::borrow<nb::list>(at(key))) found.push_back(item);
        return found;
    }

  private:
    std::string text_of(nb::handle value, const char* key) const {
        std::string text;
        if (!nb::isinstance<nb::str>(value) || !nb::try_cast(value, text)) refuse(key, "text");
        return text;
    }

    [[noreturn]] void refuse(const char* key, const char* expected) const {
        throw FormatError(what_ + ": " + key + " is not " + expected);
    }

    nb::dict fields_;
    std::string what_;
};

}  // namespace gossamer
