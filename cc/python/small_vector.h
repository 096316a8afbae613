// A vector that is usually short: up to N elements are on the stack.

#ifndef CONTINUAL_TRANSFORMERS_PYTHON_SMALL_VECTOR_H_
#define CONTINUAL_TRANSFORMERS_PYTHON_SMALL_VECTOR_H_

#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>

namespace continual_transformers {

template <typename T, size_t N>
class SmallVector {
  static_assert(std::is_trivially_copyable_v<T>, "elements are moved by memcpy");

 public:
  SmallVector() = default;
  SmallVector(const SmallVector&) = delete;
  SmallVector& operator=(const SmallVector&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

  void push_back(T element) {
    if (size_ == capacity_) Reserve(2 * capacity_);
    data_[size_++] = element;
  }
  // New elements are not initialized.
  void resize(size_t size) {
    if (size > capacity_) Reserve(size);
    size_ = size;
  }

 private:
  void Reserve(size_t capacity) {
    std::unique_ptr<T[]> heap(new T[capacity]);
    std::memcpy(heap.get(), data_, size_ * sizeof(T));
    heap_ = std::move(heap);
    data_ = heap_.get();
    capacity_ = capacity;
  }

  T inline_[N];
  T* data_ = inline_;
  size_t size_ = 0;
  size_t capacity_ = N;
  std::unique_ptr<T[]> heap_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_PYTHON_SMALL_VECTOR_H_
