#include "cc/server/message_json.h"

#include <string>

namespace continual_transformers::server {
namespace {

using nlohmann::ordered_json;

ordered_json JsonOfField(const google::protobuf::Message& message,
                         const google::protobuf::FieldDescriptor* field, int index) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection* const reflection = message.GetReflection();
  const bool repeated = field->is_repeated();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return repeated ? reflection->GetRepeatedInt32(message, field, index)
                      : reflection->GetInt32(message, field);
    case FieldDescriptor::CPPTYPE_INT64:
      return repeated ? reflection->GetRepeatedInt64(message, field, index)
                      : reflection->GetInt64(message, field);
    case FieldDescriptor::CPPTYPE_UINT64:
      return repeated ? reflection->GetRepeatedUInt64(message, field, index)
                      : reflection->GetUInt64(message, field);
    case FieldDescriptor::CPPTYPE_BOOL:
      return repeated ? reflection->GetRepeatedBool(message, field, index)
                      : reflection->GetBool(message, field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return (repeated ? reflection->GetRepeatedEnum(message, field, index)
                       : reflection->GetEnum(message, field))
          ->name();
    case FieldDescriptor::CPPTYPE_STRING:
      return repeated ? reflection->GetRepeatedString(message, field, index)
                      : reflection->GetString(message, field);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return JsonOf(repeated ? reflection->GetRepeatedMessage(message, field, index)
                             : reflection->GetMessage(message, field));
    default:  // no field of these messages
      return nullptr;
  }
}

}  // namespace

ordered_json JsonOf(const google::protobuf::Message& message) {
  const google::protobuf::Reflection* const reflection = message.GetReflection();
  const google::protobuf::Descriptor* const descriptor = message.GetDescriptor();
  ordered_json json = ordered_json::object();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const google::protobuf::FieldDescriptor* const field = descriptor->field(i);
    if (field->is_map()) {
      ordered_json* const map = &(json[field->name()] = ordered_json::object());
      for (int k = 0; k < reflection->FieldSize(message, field); ++k) {
        const auto& entry = reflection->GetRepeatedMessage(message, field, k);
        const auto* const of_entry = entry.GetDescriptor();
        (*map)[JsonOfField(entry, of_entry->map_key(), 0).get<std::string>()] =
            JsonOfField(entry, of_entry->map_value(), 0);
      }
    } else if (field->is_repeated()) {
      ordered_json* const list = &(json[field->name()] = ordered_json::array());
      for (int k = 0; k < reflection->FieldSize(message, field); ++k) {
        list->push_back(JsonOfField(message, field, k));
      }
    } else if (!field->has_presence() || reflection->HasField(message, field)) {
      json[field->name()] = JsonOfField(message, field, 0);
    }
  }
  return json;
}

}  // namespace continual_transformers::server
